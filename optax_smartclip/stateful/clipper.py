"""The base of the stateful clippers: a transformation whose state lives in `jax.Ref`s.

A gradient transformation hands its state back and leaves it to the caller. A stateful clipper keeps
it in mutable arrays of its own, which can be read and written eagerly, under `jit` and in `scan`
alike, so that it is called like a function of the gradient:

    clipper = AutoClip()
    clipped = apply_grads(grads, params, clipper)

Underneath is the transformation that `optax.chain` would be given.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import io_callback
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import is_inexact
from optax_smartclip.engine.groups import SCOPES, Groups, assign_groups
from optax_smartclip.engine.norms import Norms
from optax_smartclip.engine.stacks import Stacked, check_stacked, find_stacks, slice_shapes
from optax_smartclip.engine.states import ClipState, init_state
from optax_smartclip.engine.trees import (
    KeyPath,
    PyTree,
    flatten,
    path_name,
    prefixes,
    replace_leaves,
    unbox,
)
from optax_smartclip.stateful.saved import Key, Saved, from_json, restore, to_json

# Older versions of JAX have it under its first name.
_NEW_REF = "new_ref" if hasattr(jax, "new_ref") else "array_ref"
_new_ref: Callable[[Array], Any] = getattr(jax, _NEW_REF)

_ONE_FOR_EACH_MODEL = "Use one clipper for each model."


class MetricsRecord(TypedDict, total=False):
    """The argument of `on_metrics` for each group at each step: Python values.

    Attributes:
        algo: `"autoclip"`, `"zscore"` or `"agc"`.
        key: The group: `("global",)`, `("layer", path)` or `("param", path)`.
        scope: `"global"`, `"per_layer"` or `"per_param"`.
        grad_norm: The norm before clipping; the largest float32, 3.4e38, if it is NaN or Inf.
        threshold: What the history allows, also while warming up; 3.4e38 if it knows nothing yet.
            (Not of AGC.)
        weight_norm: The norm of the weights. (Of AGC only.)
        target: What the weights allow, also while warming up. (Of AGC only.)
        scale: What the gradient was multiplied by, in [0, 1].
        clipped: Whether the norm was over the threshold or target.
    """

    algo: str
    key: Key
    scope: str
    grad_norm: float
    threshold: float
    weight_norm: float
    target: float
    scale: float
    clipped: bool


OnMetrics = Callable[[MetricsRecord], Any]

# The shape of each leaf of a gradient; None for a parameter that is frozen or not covered.
Shapes = dict[KeyPath, tuple[int, ...] | None]


@dataclasses.dataclass(kw_only=True, eq=False)
class StatefulClipper:
    """A gradient transformation together with its state; see its three subclasses.

    The fields are the arguments, which are not to be changed later. `state_dict` saves all of them
    but `stacked`, which belongs to the model.

    Attributes:
        algo: The name of the algorithm in records and saved states.
    """

    algo: ClassVar[str]

    scope: str = "global"
    warmup_steps: Any = 100
    min_history: Any = 50
    eps: Any = 1e-8
    guard_nans: bool = True
    stacked: Stacked = None

    def __post_init__(self) -> None:
        self._set_up()
        self._keys: tuple[Key, ...] = ()
        self._refs: ClipState | None = None
        # A state that was loaded waits here to learn on which devices it belongs.
        self._loaded: ClipState | None = None
        # The shapes of the first gradient, with which later ones are compared. Not the shapes of
        # the argument of `init`, which may be another tree or, under shard_map, be whole.
        self._shapes: Shapes | None = None

    def _set_up(self) -> None:
        """Checks the arguments and builds the transformation that follows from them."""
        for name, value in self._arguments.items():
            if np.ndim(value) > 0:
                raise ValueError(f"`{name}` must be a single value, got {value!r}.")
            setattr(self, name, to_python(value))
        for name in ("warmup_steps", "min_history"):
            checks.check_steps(name, getattr(self, name))
        checks.check_number("eps", self.eps, 0.0, float("inf"), allowed="positive", strict_low=True)
        checks.check_choice("scope", self.scope, SCOPES)
        check_stacked(self.stacked, self.scope)
        self.eps = float(self.eps)
        self.guard_nans = bool(self.guard_nans)
        # The number of norms, including the one to be judged, that must have been observed.
        self._needed_norms = max(1, self.warmup_steps, self.min_history)
        self._init_rule, self._transformation = self._build()
        # Compiled, or each eager step would build the `cond` within it again.
        self._update = jax.jit(self._step, static_argnames="with_record")

    @property
    def _arguments(self) -> dict[str, Any]:
        """The arguments that are saved."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "stacked"]
        return {name: getattr(self, name) for name in names}

    def _build(self) -> tuple[Callable[[int], Any], optax.GradientTransformationExtraArgs]:
        """The initial state of the rule as a function of the number of groups, and the clipper."""
        raise NotImplementedError

    def _limits(
        self, state: ClipState, norms: Norms, grads: PyTree, params: PyTree
    ) -> dict[str, Array]:
        """The limits of this step, by their names in a `MetricsRecord`."""
        raise NotImplementedError

    def _covers(self, leaf: Any) -> bool:
        """Whether a leaf, or one slice of a stacked leaf, is clipped."""
        return is_inexact(leaf)

    @property
    def _shared_options(self) -> dict[str, Any]:
        return {
            "scope": self.scope,
            "stacked": self.stacked,
            # The engine counts the norms before the one to be judged.
            "warmup_steps": self._needed_norms - 1,
            "nonfinite": "zero" if self.guard_nans else "propagate",
        }

    def init(self, params: PyTree) -> None:
        """Creates the state, on the devices of `params`, unless there is one.

        The first `apply_grads` does the same. Call it before a step that is compiled for several
        devices outside of `jax.set_mesh`: while such a step is traced, nothing tells where the
        state belongs.

        Args:
            params: The parameters, or a tree with their structure.

        Raises:
            ValueError: If there is a state, but of parameters that fall into other groups.
        """
        keys = self._group_keys(params)
        if self._keys and keys != self._keys:
            raise ValueError(
                f"`params` must fall into the groups that this clipper has a state of, "
                f"{self._keys}, got {keys}. {_ONE_FOR_EACH_MODEL}"
            )
        if self._refs is None:
            device = _replicated(params)
            # A concrete state, even in the middle of a trace.
            with jax.ensure_compile_time_eval():
                state = self._loaded or init_state(self._init_rule(len(keys)), len(keys))
                self._refs = jax.tree.map(
                    lambda leaf: _new_ref(jax.device_put(jnp.asarray(leaf), device)), state
                )
            self._keys, self._loaded = keys, None

    def clip(self, grads: PyTree, params: PyTree, on_metrics: OnMetrics | None = None) -> PyTree:
        """The clipped gradient; see `apply_grads`."""
        self.init(grads if params is None else params)
        shown = self._covered(grads)
        shapes = _shapes(shown)
        if self._shapes is not None:
            _check_same_model(shapes, self._shapes)
        shown_params = None if params is None else self._covered(params)
        state = self._state()
        clipped, new_state, record = self._update(
            state, shown, shown_params, with_record=on_metrics is not None
        )
        self._write(new_state)
        # Only now, because a gradient that was refused teaches nothing.
        self._shapes = self._shapes or shapes
        if on_metrics is not None:
            self._report(on_metrics, record)
        return replace_leaves(grads, flatten(clipped))

    @property
    def num_steps(self) -> int | None:
        """The steps so far; None while a step is traced."""
        state = self._state()
        steps = 0 if state is None else jnp.max(state.last.num_steps)
        return None if isinstance(steps, jax.core.Tracer) else int(steps)

    def can_clip(self) -> Any:
        """Whether warm-up is over, for some group: a bool, a traced one within a traced step."""
        state = self._state()
        if state is None:
            return False
        return to_python(jnp.max(state.num_observed) >= self._needed_norms)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, arguments and state, ready for JSON."""
        return to_json(self.algo, Saved(self._arguments, self._keys, self._state()))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores arguments and state.

        A clipper that is in use keeps its arguments, as they are compiled into the steps that use
        it, and refuses a state that was saved with others.

        Args:
            state: What `state_dict` of the same class returned, through JSON or not.

        Raises:
            ValueError: If it is something else, or does not fit; then nothing has changed.
        """
        saved = from_json(self.algo, state, self._arguments)
        if self._refs is not None:
            current = {**self._arguments, "groups": self._keys}
            for name, value in {**saved.arguments, "groups": saved.keys}.items():
                if value != current[name]:
                    raise ValueError(
                        f"`state` was saved with {name}={value!r}, but this clipper is in use with "
                        f"{current[name]!r}. Load it into a new one."
                    )
        other = type(self)(stacked=self.stacked, **saved.arguments)
        restored = None
        if saved.state is not None:
            groups = len(saved.keys)
            restored = restore(init_state(other._init_rule(groups), groups), saved.state)
        if self._refs is None:
            for name, value in saved.arguments.items():
                setattr(self, name, value)
            self._set_up()
            self._keys, self._loaded = saved.keys, restored
        elif restored is not None:
            self._write(restored)
            # The shapes that are known may be those of another model.
            self._shapes = None

    def _step(
        self, state: ClipState, grads: PyTree, params: PyTree, *, with_record: bool
    ) -> tuple[PyTree, ClipState, dict[str, Array]]:
        clipped, new_state = self._transformation.update(grads, state, params)
        record: dict[str, Array] = {}
        if with_record:
            last = new_state.last
            norms = last.grad_norm.reshape(state.num_observed.shape)
            record = {
                "grad_norm": norms,
                **self._limits(state, norms, grads, params),
                "scale": last.clip_scale,
                "clipped": last.clipped,
            }
        return clipped, new_state, record

    def _report(self, on_metrics: OnMetrics, record: dict[str, Array]) -> None:
        def report(record: dict[str, Any]) -> None:
            columns = {name: np.ravel(values).tolist() for name, values in record.items()}
            for number, key in enumerate(self._keys):
                of_group = {name: values[number] for name, values in columns.items()}
                fields: Any = {"algo": self.algo, "key": key, "scope": self.scope, **of_group}
                on_metrics(fields)

        if any(isinstance(values, jax.core.Tracer) for values in record.values()):
            io_callback(report, None, record, ordered=True)
        else:
            report(record)

    def _covered(self, tree: PyTree) -> PyTree:
        """The tree with None for every leaf that is not clipped."""
        slices = slice_shapes(tree, find_stacks(self.stacked, tree))
        return jax.tree.map(
            lambda leaf, of_slice: leaf if self._covers(of_slice) else None, unbox(tree), slices
        )

    def _group_keys(self, params: PyTree) -> tuple[Key, ...]:
        labels = self._groups(self._covered(params)).labels
        kind = {"global": (), "per_layer": ("layer",), "per_param": ("param",)}[self.scope]
        return tuple((*kind, label) for label in labels)

    def _groups(self, covered: PyTree) -> Groups:
        return assign_groups(self.scope, covered, stacked=self.stacked)

    def _state(self) -> ClipState | None:
        if self._refs is None:
            return self._loaded
        state: ClipState = jax.tree.map(lambda ref: ref[...], self._refs)
        return state

    def _write(self, state: ClipState) -> None:
        def write(ref: Any, value: Any) -> None:
            ref[...] = value

        jax.tree.map(write, self._refs, state)


def _shapes(grads: PyTree) -> Shapes:
    leaves, _ = jax.tree_util.tree_flatten_with_path(grads, is_leaf=_is_empty)
    return {path: None if _is_empty(leaf) else np.shape(leaf) for path, leaf in leaves}


def _is_empty(node: Any) -> bool:
    """Whether a node has no leaves: None, or an `optax.MaskedNode`."""
    return not jax.tree.leaves(node)


def _check_same_model(now: Shapes, first: Shapes) -> None:
    """Raises ValueError with the first leaf that differs; None fits anything."""

    def describe(shapes: Shapes, path: KeyPath) -> str | None:
        if any(shapes.get(parent, ()) is None for parent in prefixes(path)):
            return None
        return f"the shape {shapes[path]}" if path in shapes else "no such leaf"

    for path in {} if now == first else {**first, **now}:
        expected, got = describe(first, path), describe(now, path)
        if expected != got and expected and got:
            raise ValueError(
                "`grads` must have the leaves of the first gradient that this clipper learned "
                f"from, got {got} for {path_name(path)!r}, where there was {expected}. "
                f"{_ONE_FOR_EACH_MODEL}"
            )


def _replicated(params: PyTree) -> Any:
    """Where a small array belongs next to `params`: a copy on each of their devices, if known."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            sharding = leaf.sharding
            if isinstance(sharding, NamedSharding):
                return NamedSharding(sharding.mesh, PartitionSpec())
            return sharding if sharding.num_devices == 1 else None
    return None


def to_python(value: Any) -> Any:
    """A scalar as a Python value, if it has one."""
    return value if isinstance(value, jax.core.Tracer) else np.asarray(value).item()
