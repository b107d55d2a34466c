"""What a LoRA is set to: rank and alpha, the rule that makes a scaling of the two, its targets, its learning rate and
seed.

Sources: Hu et al. (2021), section 4.1, for alpha / rank; Kalajdzievski (2023), arXiv:2312.03732, for alpha / sqrt(rank)
("rsLoRA").
"""
import math
from dataclasses import dataclass

from lora_edu.numbers import real, whole

FIXED_ALPHA = 16
# a rule says alpha where only the rank is chosen; at rank 8 all three give the scaling 2
RULES = {"2r": "alpha = 2r", "fixed": "alpha fixed", "rslora": "rsLoRA"}


def scaling_of(rank: int, alpha: float, rslora: bool = False) -> float:
    """What the product B A is multiplied by: alpha / rank, or alpha / sqrt(rank) with `rslora`. No unit.

    >>> scaling_of(64, 16), scaling_of(64, 16, rslora=True)
    (0.25, 2.0)
    """
    return alpha / (math.sqrt(rank) if rslora else rank)


def check_settings(in_features: int, out_features: int, rank: int, alpha: float, dropout: float = 0.0,
                   largest: float | None = None) -> tuple[int, float, float]:
    """rank, alpha and dropout as Python's own numbers; ValueError, in one sentence, where they do not fit an
    (out_features, in_features) weight.

    Args:
        largest: rank that fits; by default the weight's smaller side.
    """
    largest = min(in_features, out_features) if largest is None else largest
    asked, (rank, alpha, dropout) = (rank, alpha, dropout), (whole(rank), real(alpha), real(dropout))
    if rank is None or not 1 <= rank <= largest:
        raise ValueError(f"rank={asked[0]!r} does not fit a {out_features} x {in_features} weight: choose a whole "
                         f"number, 1 <= rank <= {largest}.")
    if alpha is None:
        raise ValueError(f"alpha={asked[1]!r} is not finite, or no number: choose one such as {2 * rank} (twice "
                         "the rank).")
    if dropout is None or not 0 <= dropout < 1:
        raise ValueError(f"dropout={asked[2]!r} is not a share: choose 0 <= dropout < 1.")
    return rank, alpha, dropout


@dataclass(frozen=True)
class LoRASettings:
    """The settings of one LoRA among many: what `LoRAStack` and `sweep` take a list of.

    Args:
        rank, alpha, target_modules: as in `apply_lora`.
        rslora: scaling is alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023, arXiv:2312.03732).
        lr: the highest learning rate it trains with.
        seed: of its random start (and of its data, where the trainer draws by seed).

    >>> LoRASettings(rank=4, alpha=8).scaling
    2.0
    >>> LoRASettings.by_rule("fixed", rank=64)
    LoRASettings(rank=64, alpha=16, target_modules='all-linear', rslora=False, lr=0.01, seed=0)
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] | str = "all-linear"
    rslora: bool = False
    lr: float = 1e-2
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.target_modules, str):       # a list becomes a tuple, so that settings can be keys
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name, read in (("rank", whole), ("alpha", real), ("lr", real), ("seed", whole)):
            value = getattr(self, name)                    # NumPy's numbers become Python's, which JSON can hold
            object.__setattr__(self, name, value if read(value) is None else read(value))

    @classmethod
    def by_rule(cls, rule: str, rank: int, **rest) -> "LoRASettings":
        """The rule's alpha: twice the rank ("2r"); 16 for every rank ("fixed"); or the same with the root of the rank
        ("rslora").

        Raises:
            ValueError: no such rule.
        """
        if rule not in RULES:
            raise ValueError(f"rule={rule!r}: choose one of {', '.join(map(repr, RULES))}.")
        alpha = {"2r": 2 * rank, "fixed": FIXED_ALPHA, "rslora": FIXED_ALPHA / math.sqrt(8)}[rule]
        return cls(rank, alpha, rslora=rule == "rslora", **rest)

    @property
    def scaling(self) -> float:
        """What the product B A is multiplied by."""
        return scaling_of(self.rank, self.alpha, self.rslora)
