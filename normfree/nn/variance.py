"""The ledger: the expected variance of the residual stream, kept in one place."""

import math

from normfree.arguments import checked, require_moderate


class VarianceLedger:
    """Expected variance of the residual stream of a normalizer-free network (Brock et al. 2021, section 3.1).

    The stem leaves variance 1. A block divides its input by the expected standard deviation (that is its β) and adds
    a branch of variance α². The first block of a stage projects its shortcut from the normalized input, so after it the
    variance is 1 + α² whatever it was before. Without normalization (an ablation) β is 1, and every block multiplies
    the variance by 1 + α².

        ledger = VarianceLedger(alpha=0.2)
        beta = ledger.enter_block(first_in_stage=True)    # 1.0; ledger.variance is now 1.04
        beta = ledger.enter_block(first_in_stage=False)   # 1/√1.04; now 1.08
    """

    @checked
    def __init__(self, alpha: float, *, normalize: bool = True) -> None:
        require_moderate(alpha=alpha)
        self.alpha = alpha
        self.normalize = normalize
        self.variance = 1.0

    def enter_block(self, *, first_in_stage: bool) -> float:
        """β of the next block, 1/√(variance before it); `variance` is from then on the one after the block."""
        if not self.normalize:
            self.variance *= 1 + self.alpha**2
            return 1.0
        beta = 1 / math.sqrt(self.variance)
        self.variance = (1.0 if first_in_stage else self.variance) + self.alpha**2
        return beta
