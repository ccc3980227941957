"""How many tokens prompts and answers have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Means of ShareGPT's conversations as the vLLM paper (SOSP 2023, section 6.1) gives them for prompts and answers. It
# gives no spread; that of the logarithm is ours, wide enough that one prompt in ten has 3 times the mean.
SHAREGPT_PROMPT, SHAREGPT_ANSWER = (161.0, 1.2), (338.0, 0.9)
_LEAST, _MOST = 1, 1 << 20


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths: log-normal, in tokens. mean: of all. sigma: deviation of the logarithm; 0 is a fixed
    length. most: what is longer is cut to it."""

    mean: float
    sigma: float = 0.0
    most: int = _MOST

    def __post_init__(self) -> None:
        if not (1 <= self.mean < math.inf and 0 <= self.sigma < math.inf):
            raise ValueError(f"lengths with mean {self.mean} and sigma {self.sigma} cannot be; the mean is 1 or more")
        if self.most < 1:
            raise ValueError(f"lengths of at most {self.most} cannot be; it must be 1 or more")

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """Return that many lengths."""
        logs = rng.normal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, count)
        return [int(n) for n in np.clip(np.rint(np.exp(logs)), _LEAST, self.most)]

    def __str__(self) -> str:
        if not self.sigma:
            return f"of {min(self.mean, self.most):g}"
        return f"log-normal, mean {self.mean:g}, sigma {self.sigma:g}, at most {self.most}"


def parse(text: str, sharegpt: tuple[float, float], most: int) -> Lengths:
    """Return the lengths that a user names: a number, "sharegpt", or "lognormal:MEAN,SIGMA".

    sharegpt: mean and sigma that the name stands for. ValueError: it is none of these.
    """
    try:
        if text == "sharegpt":
            return Lengths(*sharegpt, most)
        if text.startswith("lognormal:"):
            mean, sigma = map(float, text.removeprefix("lognormal:").split(","))
            return Lengths(mean, sigma, most)
        return Lengths(int(text), most=most)
    except ValueError as error:
        raise ValueError(f"{text!r} is no length ({error}); write 128, sharegpt or lognormal:200,0.8") from error
