"""Networks in a folder or on the hub: config.json and model.safetensors, as huggingface_hub lays them out."""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any, Self, cast

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from torch import nn

from normfree.files.documents import document_text, read_document
from normfree.files.tensors import load_state, read_tensors, write_tensors
from normfree.files.whole import replacing

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_OF_DOWNLOADS = ("force_download", "token", "cache_dir", "local_files_only", "revision")


def read_description(source: str | Path, **arguments: Any) -> dict[str, Any]:
    """Read the configuration of a saved network, with its "family", from a folder or a repository's "user/name".

    Raises FileNotFoundError for a folder without config.json, ValueError for one that is damaged.
    """
    if Path(source).exists() or not isinstance(source, str):
        path = Path(source) / CONFIG
    else:
        wanted = {name: value for name, value in arguments.items() if name in _OF_DOWNLOADS}
        path = Path(hf_hub_download(source, CONFIG, **wanted))
    return {"family": None, **read_document(path, "network that save_pretrained wrote"), "path": str(path)}


class SavedNetwork(PyTorchModelHubMixin):
    """huggingface_hub's interface with checksums: what is read is what was written, and a failure loses no file."""

    def save_pretrained(self, save_directory: str | Path, **arguments: Any) -> str | None:
        """Write config.json, model.safetensors and a README.md, each of them whole, to a folder.

        Args:
            save_directory: The folder.
            **arguments: Those of huggingface_hub, such as `push_to_hub` and `repo_id`.

        Returns:
            The address of the commit, with `push_to_hub`.

        Raises:
            OSError: Where they cannot be written; the files before are then as they were.
        """
        folder = Path(save_directory)
        with tempfile.TemporaryDirectory() as scratch:
            if (folder / "README.md").exists():
                shutil.copy(folder / "README.md", scratch)
            arguments.setdefault("repo_id", folder.name)
            address = super().save_pretrained(scratch, **arguments)
            folder.mkdir(parents=True, exist_ok=True)
            for name in (WEIGHTS, CONFIG, "README.md"):
                with replacing(folder / name) as path:
                    shutil.copy(Path(scratch) / name, path)
        return address

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments: Any) -> Self:
        """Load what `save_pretrained` wrote, in eval mode.

        Args:
            pretrained_model_name_or_path: A folder, or a repository's "user/name".
            **arguments: Those of huggingface_hub, such as `revision`, `token` and `local_files_only`.

        Returns:
            The network.

        Raises:
            ValueError: For a network of another class, and files that are damaged or not what was written.
            FileNotFoundError: For a folder that lacks a file.
        """
        described = read_description(pretrained_model_name_or_path, **arguments)
        if described["family"] not in [kind.__name__ for kind in cls.__mro__]:
            raise ValueError(f"{described['path']} is of a {described['family']}, not of a {cls.__name__}")
        return super().from_pretrained(pretrained_model_name_or_path, **arguments)

    def _save_pretrained(self, save_directory: Path) -> None:
        this = cast(Any, self)
        write_tensors(save_directory / WEIGHTS, this.state_dict())
        described = {"family": type(self).__name__, **dataclasses.asdict(this.config)}
        (save_directory / CONFIG).write_text(document_text(described))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", **arguments: Any) -> Any:
        if not Path(model_id).is_dir():
            return super()._from_pretrained(model_id=model_id, map_location=map_location, **arguments)
        # huggingface_hub's own way would print that it does so.
        built = {name: value for name, value in arguments.items() if name not in (*_OF_DOWNLOADS, "strict")}
        return cls._load_as_safetensor(cls(**built), str(Path(model_id) / WEIGHTS), map_location, strict=True)

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """Load in the dtype of the file; nothing may be missing."""
        network: nn.Module = model
        tensors, _ = read_tensors(model_file)
        name = next(name for name, _ in network.named_parameters())
        if name in tensors:
            network.to(tensors[name].dtype)
        try:
            load_state(network, tensors)
        except ValueError as error:
            raise ValueError(f"{model_file} does not fit {cls.__name__}: {error}") from error
        return network.to(map_location).eval()
