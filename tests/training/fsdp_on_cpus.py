"""`python -m normfree` with accelerate's FSDP on CPUs, which accelerate itself offers on accelerators only."""

import os
import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from normfree.cli import main

original = AcceleratorState.__init__


def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = init
code: Any = 0
try:
    main()
except SystemExit as end:
    code = end.code
sys.stdout.flush()
sys.stderr.flush()
# gloo's threads outlive a process group that a device mesh refers to, and one that frees a tensor while the interpreter
# shuts down aborts the process (pytorch/pytorch#190489).
os._exit(code)
