"""A stateful clipper as JSON: its arguments, the keys of its groups, and its state.

The layout is that of smartclip's `state_dict`: what all clippers share at the top, the rest under
the algorithm's name. Only what stands under `state` is ours.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_smartclip.engine.states import ClipState
from optax_smartclip.engine.trees import leaves_by_name

Key = tuple[str, ...]

_EXPECTED = "`state` must be what `state_dict()` of the same class returned"
_SHARED = ("scope", "eps", "guard_nans")
_GATE = ("warmup_steps", "min_history")


class Saved(NamedTuple):
    """The saved form of a clipper.

    Attributes:
        arguments: The arguments of its constructor.
        keys: One for each group, none before the first step.
        state: Its state; None before the first step. Read from JSON, a nested list for each leaf,
            by name.
    """

    arguments: dict[str, Any]
    keys: tuple[Key, ...]
    state: Any


def to_json(algo: str, saved: Saved) -> dict[str, Any]:
    """The state dict: dictionaries, lists, strings, bools and numbers."""
    arguments = dict(saved.arguments)
    shared = {name: arguments.pop(name) for name in _SHARED}
    gate = {name: arguments.pop(name) for name in _GATE}
    own = arguments | {"keys": [list(key) for key in saved.keys], "state": None}
    counts = {"steps": 0, "observations": 0}
    if saved.state is not None:
        own["state"] = {name: _to_list(leaf) for name, leaf in leaves_by_name(saved.state).items()}
        counts = {
            "steps": int(np.max(saved.state.last.num_steps)),
            "observations": int(np.max(saved.state.num_observed)),
        }
    return shared | {"gate": gate | counts, algo: own}


def from_json(algo: str, state: Any, names: Any) -> Saved:
    """Reads a state dict of the clipper `algo`, whose constructor has arguments of these `names`.

    Raises:
        ValueError: If something is missing, or it is something else.
    """
    try:
        own = state[algo]
        arguments = {**own, **state["gate"], **state}
        saved = Saved(
            arguments={name: arguments[name] for name in names},
            keys=tuple(tuple(key) for key in own["keys"]),
            state=own["state"],
        )
    except KeyError as error:
        raise ValueError(f"{_EXPECTED}: {error} is missing.") from None
    except (TypeError, AttributeError):
        raise ValueError(f"{_EXPECTED}, got {state!r}.") from None
    if not isinstance(saved.state, Mapping if saved.keys else type(None)):
        raise ValueError(f"{_EXPECTED}, got keys {saved.keys} and {saved.state!r} as their state.")
    return saved


def restore(template: ClipState, lists: Mapping[str, Any]) -> ClipState:
    """The saved state, with the structure, shapes and dtypes of `template`, as NumPy arrays.

    Raises:
        ValueError: If a leaf is missing, has another shape or does not consist of numbers.
    """

    def leaf(name: str, like: Any) -> np.ndarray:
        if name not in lists:
            raise ValueError(f"`state` must have {name!r} of shape {like.shape}, but has none.")
        array = np.asarray(lists[name], object)
        if array.shape != like.shape:
            raise ValueError(
                f"`state` must have {name!r} of shape {like.shape}, got {array.shape}."
            )
        try:
            return array.astype(like.dtype)
        except (TypeError, ValueError):
            raise ValueError(
                f"`state` must have numbers for {name!r}, got {lists[name]!r}."
            ) from None

    leaves = [leaf(name, like) for name, like in leaves_by_name(template).items()]
    restored: ClipState = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return restored


def _to_list(leaf: Any) -> Any:
    """Nested lists; a float32 is exact as a Python float, and a string where JSON has none."""
    array = np.asarray(leaf)
    values = array.astype(object)
    if np.issubdtype(array.dtype, np.floating):
        odd = ~np.isfinite(array)
        values[odd] = array[odd].astype(str)
    return values.tolist()
