"""What an adapter's log-probabilities are worth: the log-odds that the target accepts a token, linear in those that the adapters give.

Two adapters are sure of themselves to different degrees, so their scores do not compare as they stand. `calibration.json` in the
shallow adapter's directory holds a few numbers, fitted on held-out prompts (evaluation/calibrate.py), for one draft exit. Without it, or
with another draft, scores are taken as they are: the shallow verifier's where it has looked, else the draft's.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cats.errors import CatsError
from cats.files import write_atomically

CALIBRATION_FILE, FORMAT = "calibration.json", "cats calibration 1"
SURE = -1e-4
"""Log-probabilities above this count as this: log-odds have no end."""


@dataclass(frozen=True)
class Calibration:
    """Weights of log-odds.

    Attributes:
        draft_exit: exit of the draft adapter that it was fitted with; 0 fits any.
        drafted: bias and the weight of the draft's log-odds, for what only the draft has seen.
        checked: bias and the weights of the draft's and the shallow verifier's log-odds, for what both have seen.
    """

    draft_exit: int = 0
    drafted: tuple[float, float] = (0.0, 1.0)
    checked: tuple[float, float, float] = (0.0, 0.0, 1.0)

    def __post_init__(self) -> None:
        counts, numbers = (len(self.drafted), len(self.checked)), (*self.drafted, *self.checked)
        if counts != (2, 3) or not all(math.isfinite(number) for number in numbers):
            raise CatsError(f"a calibration has 2 and 3 finite weights, not {self.drafted} and {self.checked}")

    def after_draft(self, draft: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of acceptance, of the draft's log-probabilities."""
        bias, weight = self.drafted
        return torch.nn.functional.logsigmoid(bias + weight * log_odds(draft))

    def after_check(self, draft: torch.Tensor, shallow: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of acceptance, of both adapters' log-probabilities of the same tokens."""
        bias, weight, shallow_weight = self.checked
        return torch.nn.functional.logsigmoid(bias + weight * log_odds(draft) + shallow_weight * log_odds(shallow))

    def for_draft(self, exit_layer: int) -> "Calibration":
        """This one where it fits the draft exit, else scores as they are."""
        return self if self.draft_exit in (0, exit_layer) else AS_IS


def log_odds(log_probabilities: torch.Tensor) -> torch.Tensor:
    """`log(p / (1 - p))`, of `log(p)`."""
    bounded = log_probabilities.clamp(max=SURE)
    return bounded - torch.log(-torch.expm1(bounded))


AS_IS = Calibration()


def calibration_in(directory: str | Path) -> Calibration:
    """The calibration that lies in an adapter's directory, else `AS_IS`; a damaged one raises `CatsError`."""
    path = Path(directory) / CALIBRATION_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise ValueError(f"its format is {fields['format']!r}, not {FORMAT!r}")
        weights = {name: tuple(map(float, fields[name])) for name in ("drafted", "checked")}
        return Calibration(int(fields["draft_exit"]), **weights)  # type: ignore[arg-type]
    except FileNotFoundError:
        return AS_IS
    except KeyError as error:
        raise CatsError(f"{path} lacks {error.args[0]!r}; fit it again, or remove it.") from error
    except (OSError, TypeError, ValueError, CatsError) as error:
        raise CatsError(f"{path} cannot be used: {str(error).splitlines()[0]}; fit it again, or remove it.") from error


def save_calibration(calibration: Calibration, directory: str | Path, about: dict[str, Any]) -> Path:
    """Write it where `calibration_in` looks, atomically, with `about` beside the weights; returns the file."""
    path = Path(directory) / CALIBRATION_FILE
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(calibration), **about}, indent=1) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
    return path
