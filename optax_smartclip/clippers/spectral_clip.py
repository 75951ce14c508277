"""Spectral clipping: cut the singular values of each matrix of an update, with a learned limit.

    s  ->  s / sqrt(1 + s^2 / c^2)                  for each singular value s of a matrix
    c = factor * median(largest singular value of the last steps)

Jiang, Semenov, Stich, `SPECTRA <https://arxiv.org/abs/2603.14315>`_, 2026, with a fixed c.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32

from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import as_float32, working_dtype
from optax_smartclip.engine.groups import Groups, LeafMask, assign_groups
from optax_smartclip.engine.matrices import (
    as_matrices,
    from_matrices,
    is_matrix,
    matrix_shape,
)
from optax_smartclip.engine.meshes import gather, replicate, split_as, vary_as, vary_as_before
from optax_smartclip.engine.metrics import increment_where, next_metrics
from optax_smartclip.engine.norms import LARGEST, accumulator, has_gradient, learnable, safe_sqrt
from optax_smartclip.engine.scaling import limit_threshold
from optax_smartclip.engine.singular_values import (
    REACH,
    bound_largest,
    first_vector,
    multiply,
    soft_cut,
    within_reach,
)
from optax_smartclip.engine.stacks import Stacked, check_stacked
from optax_smartclip.engine.states import (
    ClipState,
    check_fits,
    init_state,
    leaf_names,
    select_groups,
    state_dataclass,
)
from optax_smartclip.engine.trees import PyTree, clippable_leaves, flatten, replace_leaves
from optax_smartclip.histories.history import HistoryState
from optax_smartclip.histories.ring_buffer import MAX_SIZE, ring_buffer

_MEDIAN = 50.0


@state_dataclass
class SpectralState:
    """The state of `spectral_clip` for each matrix.

    Attributes:
        vectors: The estimate of the first singular vector on the shorter side, of norm 1, from
            which power iteration goes on. Zeros fill the rows of smaller matrices.
        history: The largest singular values of the last steps.
    """

    vectors: Float32[Array, "groups rows"]
    history: HistoryState


def spectral_clip(
    factor: Any = 0.3,
    *,
    limit: Any = None,
    window: Any = 128,
    num_iterations: Any = 12,
    stacked: Stacked = None,
    mask: LeafMask = None,
    warmup_steps: Any = 1,
    nonfinite: str = "zero",
) -> optax.GradientTransformationExtraArgs:
    """Cuts the singular values of each matrix softly, to a limit learned from past steps.

    A singular value `s` becomes `s / sqrt(1 + s ** 2 / c ** 2)`: one that is far below the limit
    `c` is left alone, and none exceeds it. `c` is `factor` times the median of the largest singular
    values of that matrix in the last steps, *the current one left out*. The raw values are
    recorded. So nearly every step is cut, and its directions become more equal. It belongs after
    the step of an optimizer and before its learning rate, as in the example.

    A matrix is a leaf of real numbers with two axes, or with two beside the `stacked` ones. All
    others pass as they are: vectors, and kernels of convolutions.

    The largest singular value is estimated by one step of power iteration in each step, so that it
    may be too small, and never less than the norm of the largest row. Whatever the estimate, the
    cut is that for the limit. It costs 37 products of square matrices, as long as the shorter side,
    and 4 with the matrix itself.

    Args:
        factor: The limit in units of the median, > 0.
        limit: The limit of all matrices from the first step on, in the unit of the update, > 0; or
            None for one that is learned.
        window: Of how many steps the median is taken, a Python int from 1 to 16,777,216.
        num_iterations: Newton-Schulz iterations, a Python int from 6 to 12. With 12, the cut is
            exact where the largest singular value is up to 5,500 limits, with 10 up to 820, with 6
            up to 18. Where it is more, the matrix is first multiplied by what brings it there:
            the largest is cut as it should be, and all others shrink with it.
        stacked: Axes that count layers, each with a matrix of its own; see `clip_by_rule`.
        mask: Which leaves take part; see `clip_by_rule`.
        warmup_steps: How many positive, finite values a matrix has observed before a learned limit
            may cut it. A number >= 0.
        nonfinite: `"zero"` or `"propagate"`, for matrices with a NaN or Inf; see `clip_by_rule`.

    Returns:
        A gradient transformation. Its groups are those of the scope "per_param". In its metrics,
        `grad_norm` is the estimate of the largest singular value, `clip_threshold` is the limit,
        `clip_scale` is what the largest is multiplied by, and `clipped` is whether it was over the
        limit. Leaves that pass have a norm of 0.

    Raises:
        ValueError: If an argument is out of range; from `init`, if `stacked` or `mask` does not
            fit the parameters; from `update`, if the gradient has other groups than the parameters
            had.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_smartclip as smartclip
        >>> tx = optax.chain(
        ...     optax.scale_by_adam(),
        ...     smartclip.spectral_clip(),
        ...     optax.scale_by_learning_rate(3e-4),
        ... )

        Of singular values 4, 1 and 0, with a limit of 2:

        >>> tx = smartclip.spectral_clip(limit=2.0)
        >>> updates = {"kernel": jnp.diag(jnp.array([4.0, 1.0, 0.0])), "bias": jnp.ones(3)}
        >>> cut, state = tx.update(updates, tx.init(updates))
        >>> print((1e3 * jnp.diagonal(cut["kernel"])).astype(int))  # 4 / sqrt(5), 1 / sqrt(1.25)
        [1788  894    0]
        >>> print(smartclip.metrics(state)["grad_norm"])
        [0. 4.]
    """
    checks.check_positive("factor", factor)
    checks.check_positive("limit", limit, none="to learn it")
    checks.check_size("window", window, MAX_SIZE)
    checks.check_size(
        "num_iterations", num_iterations, max(REACH), low=min(REACH), why="it sets the program"
    )
    checks.check_clip_options(warmup_steps, None, nonfinite)
    check_stacked(stacked, "per_param")
    history = ring_buffer(window)

    def groups_of(tree: PyTree) -> Groups:
        return assign_groups("per_param", tree, stacked=stacked, mask=mask)

    def init_fn(params: PyTree) -> ClipState:
        groups = groups_of(params)
        initial = rule_state(groups.num_groups, _most_rows(params, groups))
        return vary_as(init_state(initial, groups.num_groups), params)

    def rule_state(num_groups: int, rows: int) -> SpectralState:
        vectors = jnp.zeros((num_groups, rows), jnp.float32)
        return SpectralState(vectors=vectors, history=history.init(num_groups))

    rule_fields = leaf_names(jax.eval_shape(lambda: rule_state(1, 1)))

    def limits_of(state: ClipState, dtype: Any) -> Float[Array, " groups"]:
        if limit is not None:
            return jnp.full(state.num_observed.shape, limit, dtype)
        median = history.percentile(state.rule.history, _MEDIAN)
        learned = jnp.where(median < LARGEST, as_float32(factor) * median, LARGEST)
        return limit_threshold(learned, state.num_observed, warmup_steps, None, dtype)

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ClipState]:
        del extra_args
        tree = updates if params is None else params
        groups = groups_of(tree)
        check_fits(state, groups.num_groups, lambda: rule_fields)
        _check_rows(state.rule.vectors, _most_rows(tree, groups))
        leaves = {
            path: leaf
            for path, leaf in clippable_leaves(updates, groups.takes_part).items()
            if is_matrix(leaf, groups.stacks[path])
        }
        limits = limits_of(state, accumulator(list(leaves.values())))
        norms, vectors = jnp.zeros_like(limits), state.rule.vectors
        cut_leaves = {}
        for path, leaf in leaves.items():
            whole, stack, first = gather(leaf), groups.stacks[path], groups.first[path]
            matrices = as_matrices(whole, stack)
            count, rows, _ = matrices.shape
            here = slice(first, first + count)
            known = limits[here], vectors[here, :rows]
            cut, sizes, found = _cut_all(matrices, *known, num_iterations, nonfinite)
            cut_leaves[path] = split_as(from_matrices(cut, whole, stack), leaf)
            norms = jax.lax.dynamic_update_slice(norms, sizes.astype(norms.dtype), (first,))
            vectors = jax.lax.dynamic_update_slice(vectors, as_float32(found), (first, 0))

        norms = replicate(norms)
        live = has_gradient(norms)
        shown = jnp.where(live, learnable(norms), 0.0)
        recorded = history.record(state.rule.history, shown, (_MEDIAN,))
        learned = SpectralState(vectors=replicate(vectors), history=recorded)
        next_state = ClipState(
            rule=select_groups(live, learned, state.rule),
            num_observed=increment_where(live, state.num_observed),
            last=next_metrics(state.last, norms, limits, soft_scale(norms, limits), nonfinite),
        )
        return replace_leaves(updates, cut_leaves), vary_as_before(next_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def soft_scale(
    norms: Float[Array, " groups"], limits: Float[Array, " groups"]
) -> Float[Array, " groups"]:
    """The factors of the largest singular values: 1 where there is no limit."""
    limits = jnp.maximum(limits, jnp.finfo(limits.dtype).tiny)
    norms = jnp.where(jnp.isfinite(norms), norms, 0.0)
    # In units of the larger, so that no square overflows.
    unit = jnp.maximum(limits, norms)
    limits, norms = limits / unit, norms / unit
    return limits * jax.lax.rsqrt(jnp.square(limits) + jnp.square(norms))


# Compiled, or eager steps would trace it every time, and once for all leaves of a shape.
@partial(jax.jit, static_argnums=(3, 4))
def _cut_all(
    matrices: Float[Array, "slices rows columns"],
    limits: Float[Array, " slices"],
    vectors: Float[Array, "slices rows"],
    num_iterations: int,
    nonfinite: str,
) -> tuple[Float[Array, "slices rows columns"], Float[Array, " slices"], Float[Array, "..."]]:
    """The cut matrices, their largest singular values, and the vectors of these."""

    def cut(
        matrix: Float[Array, "rows columns"], limit: Float[Array, ""], vector: Float[Array, " rows"]
    ) -> tuple[Float[Array, "rows columns"], Float[Array, ""], Float[Array, " rows"]]:
        dtype = working_dtype(matrix.dtype)
        is_known = limit < jnp.finfo(limit.dtype).max
        limit, vector = limit.astype(dtype), vector.astype(dtype)
        largest = jnp.max(jnp.abs(matrix)).astype(dtype)
        has_unit = jnp.isfinite(largest) & (largest > 0)
        # So that no square overflows or is lost. The result does not depend on the unit.
        unit = jax.lax.stop_gradient(jnp.where(has_unit, largest, 1.0))
        in_units = jnp.where(has_unit, matrix, 0.0).astype(dtype) / unit
        gram = multiply(in_units, in_units.T)
        vector, square = first_vector(gram, vector)
        size = jnp.where(has_unit, unit * safe_sqrt(square), largest)

        bound = bound_largest(gram)
        within = within_reach(limit / unit, bound, num_iterations)
        result = soft_cut(in_units, gram, bound, within, num_iterations)
        # Out of the unit, and what `within` has added to the limit, in one number: a product of two
        # could be lost.
        result = (result * jnp.minimum(unit, limit / within)).astype(matrix.dtype)
        otherwise = jnp.zeros_like(matrix) if nonfinite == "zero" else matrix
        kept = jnp.where(is_known, result, matrix)
        return jnp.where(jnp.isfinite(size), kept, otherwise), size, vector

    return jax.vmap(cut)(matrices, limits, vectors)


def _most_rows(tree: PyTree, groups: Groups) -> int:
    """The shorter side of the largest matrix: the length of its vector."""
    leaves = {path: leaf for path, leaf in flatten(tree).items() if groups.takes_part(path)}
    sides = (
        min(matrix_shape(leaf, groups.stacks[path]))
        for path, leaf in leaves.items()
        if is_matrix(leaf, groups.stacks[path])
    )
    return max(sides, default=0)


def _check_rows(vectors: Float[Array, "groups rows"], rows: int) -> None:
    if vectors.shape[1] != rows:
        raise ValueError(
            f"The state must have 'vectors' of shape {(len(vectors), rows)}, with the shorter side "
            f"of the largest matrix, got {vectors.shape}. Shapes are those of the parameters that "
            "`init` was called with."
        )
