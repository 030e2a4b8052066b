"""How functions are compiled, and how what was compiled is kept."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Compiled = TypeVar("Compiled", bound=Callable[..., Any])


def compiled(function: Compiled) -> Compiled:
    """`numba.njit`, kept on disk, with the function's own type; numba's types know only its dispatcher."""
    return cast(Compiled, numba.njit(cache=True, error_model="numpy")(function))


def part(function: Compiled) -> Compiled:
    """The same for a function that is called by compiled ones only: it is compiled into them and kept with them."""
    return cast(Compiled, numba.njit(error_model="numpy")(function))


def digest_of_package() -> int:
    """Of the text of this package.

    What numba keeps it finds again by the file of that one function and by what its closure holds.  A function that is
    made of parts in other files has this in its closure, else it would be stale after a change of them.
    """
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
