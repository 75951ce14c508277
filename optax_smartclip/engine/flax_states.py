"""How `flax.serialization` learns of the declared states, whenever the program imports it.

Flax itself need be neither installed nor imported. It knows neither chex dataclasses nor a way to
tell it of a type but to call it.
"""

import dataclasses
import sys
from typing import Any

import jax

from optax_smartclip.engine.late_imports import on_import

_FLAX = "flax.serialization"
_declared: list[type] = []


def serialize_with_flax(cls: type) -> None:
    """Lets Flax save and restore a declared state: now if it is loaded, else once it is."""
    _declared.append(cls)
    if _FLAX in sys.modules:
        _register(sys.modules[_FLAX], cls)


def _register_all(serialization: Any) -> None:
    for cls in _declared:
        _register(serialization, cls)


on_import(_FLAX, _register_all)


def _register(serialization: Any, cls: type) -> None:
    names = [field.name for field in dataclasses.fields(cls)]

    def to_state_dict(node: Any) -> dict[str, Any]:
        return {name: serialization.to_state_dict(getattr(node, name)) for name in names}

    # Restored leaves are NumPy arrays; as JAX itself does when it unflattens, the object is built
    # around them without a call of __init__, which may check types.
    def from_state_dict(node: Any, saved: dict[str, Any]) -> Any:
        if set(saved) != set(names):
            raise ValueError(
                f"A saved {type(node).__name__} must have the fields {sorted(names)}, "
                f"got {sorted(saved)}."
            )
        restored = object.__new__(type(node))
        for name in names:
            current = getattr(node, name)
            value = serialization.from_state_dict(current, saved[name], name=name)
            # Flax would take an array of any length. What has no shape stands for an array, as
            # the partition specs or None of T5X do.
            shapes = [each.shape for each in (current, value) if hasattr(each, "shape")]
            if len(set(shapes)) > 1:
                raise ValueError(
                    f"A saved {type(node).__name__} must have {name!r} of shape "
                    f"{shapes[0]}, as the clipper of this run has, got {shapes[1]}."
                )
            if name == "last":
                value = jax.tree.map(_as_today, current, value, is_leaf=lambda x: x is None)
            object.__setattr__(restored, name, value)
        return restored

    serialization.register_serialization_state(cls, to_state_dict, from_state_dict)


def _as_today(current: Any, saved: Any) -> Any:
    # Version 0.1.0 reported of the units of `agc` whether any was clipped, and not how many.
    is_array = hasattr(current, "dtype") and hasattr(saved, "dtype")
    return saved.astype(current.dtype) if is_array and saved.dtype == bool else saved
