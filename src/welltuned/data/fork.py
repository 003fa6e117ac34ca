"""Where a preference pair's tokens lie: [what both answers begin with][the chosen one's own][the rejected one's]."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Fork(NamedTuple):
    """A row of two sequences that begin alike.

    Attributes:
        shared: tokens [0, shared) begin both sequences, and none of them is trained.
        second: tokens [shared, second) go on with the chosen answer, those from `second` on with the rejected one.
    """

    shared: int
    second: int

    def positions(self, length: int) -> NDArray[np.int64]:
        """Each token's place in its own sequence [length]."""
        places = np.arange(length)
        places[self.second :] -= self.second - self.shared
        return places

    def cut(self, length: int, max_length: int) -> tuple[NDArray[np.bool_], "Fork"]:
        """Which tokens [length] stay where each sequence is cut to `max_length`, and where they fork then."""
        keep = self.positions(length) < max_length
        return keep, Fork(int(keep[: self.shared].sum()), int(keep[: self.second].sum()))

    def branches(self, length: int) -> tuple[int, int]:
        """Tokens of the chosen and of the rejected sequence after what they share."""
        return self.second - self.shared, length - self.second
