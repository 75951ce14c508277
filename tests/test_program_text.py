"""Figures of compiled programs: texts with figures worked out by hand, and real programs."""

import jax
import jax.numpy as jnp
import pytest
from compilation import JUDGED
from program_text import KERNELS, ProgramText, arrays, elements, shape_bytes

# 1024 numbers: 4096 bytes.
MAIN, FAST = "f32[8,128]{1,0:T(8,128)}", "f32[8,128]{1,0:T(8,128)S(1)}"
ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}
"""
DOUBLE = """
%double (param_0: f32[8,128]) -> f32[8,128] {
  %param_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %add.1 = f32[8,128]{1,0:T(8,128)} add(%param_0, %param_0)
}
"""


def program(entry, *others, parameters=f"%x = {MAIN} parameter(0)"):
    """A program whose entry computation has these lines, the last of which is its result."""
    *lines, last = [line.strip() for line in f"{parameters}\n{entry}".strip().splitlines()]
    body = "\n".join(f"  {line}" for line in (*lines, f"ROOT {last}"))
    header = "HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0})}\n"
    return ProgramText(
        header
        + "".join(others)
        + "\nENTRY %main.7 (x: f32[8,128]) -> f32[8,128] {\n"
        + body
        + "\n}"
    )


# Shapes.


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[3,4]{1,0}", 48),
        ("f32[]", 4),
        ("bf16[10]{0:T(1024)(128)(2,1)}", 20),
        ("pred[5]{0}", 5),
        ("s4[10]{0:E(4)}", 5),
        ("c64[2]{0}", 16),
        ("f8e4m3fn[7]{0}", 7),
        ("f32[0,4]{1,0}", 0),
        ("(f32[3]{0}, /*index=1*/(s32[2]{0}, u8[]))", 21),
    ],
)
def test_the_size_of_a_shape_is_that_of_its_arrays(shape, size):
    assert shape_bytes(shape) == size


def test_the_memory_space_in_the_layout_tells_arrays_outside_main_memory():
    shape = f"({MAIN}, {FAST}, f32[2]{{0:S(0)}}, u32[]{{:S(2)}}, f32[5])"
    assert [array.in_main_memory for array in arrays(shape)] == [True, False, True, False, True]


def test_a_tuple_is_split_at_its_own_commas_only():
    inner = "(f32[4096,1024]{1,0:T(8,128)}, s32[])"
    assert elements(f"({inner}, {FAST}, s32[]{{:S(2)}})") == [inner, FAST, "s32[]{:S(2)}"]


# Traffic.


def test_a_fusion_reads_its_operands_and_writes_its_results():
    two = program(
        f"""
        %pair = ({MAIN}, f32[]{{:T(128)}}) fusion(%x, %x), kind=kLoop, calls=%both, metadata={{}}
        %first = {MAIN} get-tuple-element(%pair), index=0
        %seen = f32[1024]{{0:T(1024)}} bitcast(%first)
        %out = {MAIN} fusion(%seen), kind=kLoop, calls=%double
        """,
        DOUBLE,
        f"""
%both (p: f32[8,128], q: f32[8,128]) -> (f32[8,128], f32[]) {{
  %p = {MAIN} parameter(0)
  %q = {MAIN} parameter(1)
  %zero = f32[]{{:T(128)}} constant(0)
  %all = f32[]{{:T(128)}} reduce(%q, %zero), dimensions={{0,1}}, to_apply=%add
  %sum = {MAIN} add(%p, %q)
  ROOT %results = ({MAIN}, f32[]{{:T(128)}}) tuple(%sum, %all)
}}
""",
        ADD,
    )
    # The first reads 2 arrays and writes one and a number, the second reads and writes one.
    assert two.traffic() == 5 * 4096 + 4
    assert two.operations()["fusion"] == 2


def test_an_array_fetched_into_fast_memory_is_read_once():
    fetched = program(
        f"""
        %start = ({FAST}, {MAIN}, u32[]{{:S(2)}}) copy-start(%x)
        %done = {FAST} copy-done(%start)
        %first = {FAST} fusion(%done), kind=kLoop, calls=%double
        %second = {FAST} fusion(%done), kind=kLoop, calls=%double
        """,
        DOUBLE,
    )
    assert fetched.traffic() == 4096


def test_an_array_copied_back_from_fast_memory_is_written_once():
    put_back = program(
        f"""
        %first = {FAST} fusion(%x), kind=kLoop, calls=%double
        %start = ({MAIN}, {FAST}, u32[]{{:S(2)}}) copy-start(%first)
        %done = {MAIN} copy-done(%start)
        """,
        DOUBLE,
    )
    assert put_back.traffic() == 2 * 4096


def test_an_asynchronous_slice_moves_its_own_size():
    half = "f32[4,128]{1,0:T(4,128)S(1)}"
    start = f"(({MAIN}), {half}, s32[]{{:S(2)}})"
    halves = program(
        f"""
        %s1 = {start} slice-start(%x), slice={{[0:4], [0:128]}}
        %s2 = {start} slice-start(%x), slice={{[4:8], [0:128]}}
        %d1 = {half} slice-done(%s1)
        %d2 = {half} slice-done(%s2)
        %both = {FAST} custom-call(%d1, %d2), custom_call_target="ConcatBitcast"
        %out = {FAST} fusion(%both), kind=kLoop, calls=%double
        """,
        DOUBLE,
    )
    assert halves.traffic() == 4096
    one = program(
        f"%s = (({MAIN}), f32[2,128]{{1,0}}, s32[]) slice-start(%x), slice={{[0:2], [0:128]}}"
    )
    # Within main memory it is read and written.
    assert one.traffic() == 2 * 1024


@pytest.mark.parametrize(("target", "moved"), [("ConcatBitcast", 0), ("Sort", 2 * 4096)])
def test_slices_seen_as_one_array_move_nothing_and_other_custom_calls_do(target, moved):
    call = f'%out = {MAIN} custom-call(%x), custom_call_target="{target}"'
    assert program(call).traffic() == moved


def test_an_asynchronous_computation_moves_what_the_same_fusion_would():
    start = f"(({MAIN}, s32[]), f32[1,128]{{1,0:S(1)}}, s32[]{{:S(2)}})"
    wrapped = program(
        f"""
        %i = s32[] constant(3)
        %start = {start} async-start(%x, %i), calls=%row
        %done = f32[1,128]{{1,0:S(1)}} async-done(%start)
        """,
        ROW,
    )
    # A row of the array, and the number of the row.
    assert wrapped.traffic() == 512 + 4


ROW = f"""
%row (p: f32[8,128], i: s32[]) -> f32[1,128] {{
  %p = {MAIN} parameter(0)
  %view = f32[8,128]{{1,0}} bitcast(%p)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,128]{{1,0}} dynamic-slice(%view, %i, %zero), dynamic_slice_sizes={{1,128}}
}}
"""
ROW_AND_ALL = ROW.replace("%row", "%row_and_all").replace(
    "ROOT %slice = f32[1,128]{1,0} dynamic-slice(%view, %i, %zero), dynamic_slice_sizes={1,128}",
    "%slice = f32[1,128]{1,0} dynamic-slice(%view, %i, %zero), dynamic_slice_sizes={1,128}\n"
    "  %top = f32[1,128]{1,0} reduce(%p, %zero), dimensions={0}, to_apply=%add\n"
    "  ROOT %sum = f32[1,128]{1,0} add(%slice, %top)",
)


@pytest.mark.parametrize(
    ("shape", "computation", "read"),
    [
        (MAIN, "row", 512),
        (FAST, "row", 0),
        (MAIN, "row_and_all", 4096),
    ],
)
def test_a_fusion_that_begins_with_a_slice_reads_no_more_than_the_slice(shape, computation, read):
    sliced = program(
        f"""
        %i = s32[] constant(3)
        %out = f32[1,128]{{1,0}} fusion(%x, %i), kind=kLoop, calls=%{computation}
        """,
        ROW,
        ROW_AND_ALL,
        ADD,
        parameters=f"%x = {shape} parameter(0)",
    )
    assert sliced.traffic() == read + 4 + 512


def test_an_update_of_a_slice_moves_the_update_and_not_the_array():
    update = """
%put (p: f32[8,128], row: f32[1,128], i: s32[]) -> (f32[8,128], f32[1,128]) {
  %p = f32[8,128]{1,0} parameter(0)
  %row = f32[1,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %twice = f32[1,128]{1,0} add(%row, %row)
  %put1 = f32[8,128]{1,0} dynamic-update-slice(%p, %twice, %i, %zero)
  %put2 = f32[8,128]{1,0} dynamic-update-slice(%put1, %row, %zero, %zero)
  %seen = f32[8,128]{1,0} bitcast(%put2)
  ROOT %results = (f32[8,128]{1,0}, f32[1,128]{1,0}) tuple(%seen, %twice)
}
"""
    rows = """
        %x = f32[8,128]{1,0} parameter(0)
        %row = f32[1,128]{1,0} parameter(1)
        %i = s32[] constant(3)
    """
    fused = program(
        "%out = (f32[8,128]{1,0}, f32[1,128]{1,0}) fusion(%x, %row, %i), kind=kLoop, calls=%put",
        update,
        parameters=rows,
    )
    # The row and its number are read, two rows of the array and the second result written.
    assert fused.traffic() == 512 + 4 + 3 * 512
    alone = program(
        "%out = f32[8,128]{1,0} dynamic-update-slice(%x, %row, %i, %i)", parameters=rows
    )
    assert alone.traffic() == 2 * 512 + 2 * 4


# Loops, branches, calls.

BRANCHES = f"""
%body (p: (f32[8,128], pred[])) -> (f32[8,128], pred[]) {{
  %p = ({MAIN}, pred[]) parameter(0)
  %old = {MAIN} get-tuple-element(%p), index=0
  %new = {MAIN} fusion(%old), kind=kLoop, calls=%double
  %again = {MAIN} copy(%new)
  %more = pred[] get-tuple-element(%p), index=1
  ROOT %state = ({MAIN}, pred[]) tuple(%again, %more)
}}

%condition (p: (f32[8,128], pred[])) -> pred[] {{
  %p = ({MAIN}, pred[]) parameter(0)
  ROOT %more = pred[] get-tuple-element(%p), index=1
}}

%cheap (p: f32[8,128]) -> f32[8,128] {{
  ROOT %p = {MAIN} parameter(0)
}}

%costly (p: f32[8,128]) -> f32[8,128] {{
  %p = {MAIN} parameter(0)
  ROOT %c = {MAIN} copy(%p)
}}

%both (p: f32[8,128]) -> f32[8,128] {{
  %p = {MAIN} parameter(0)
  %yes = pred[] constant(true)
  %t = ({MAIN}, pred[]) tuple(%p, %yes)
  %loop = ({MAIN}, pred[]) while(%t), condition=%condition, body=%body
  ROOT %q = {MAIN} get-tuple-element(%loop), index=0
}}
"""
WHILE = f"""
%yes = pred[] constant(true)
%t = ({MAIN}, pred[]) tuple(%x, %yes)
%loop = ({MAIN}, pred[]) while(%t), condition=%condition, body=%body
%out = {MAIN} get-tuple-element(%loop), index=0
"""
CONDITIONALS = (
    "%c = {main} conditional(%i, %x, %x, %x), branch_computations={{%cheap, %both, %costly}}",
    "%c = {main} conditional(%i, %x, %x), true_computation=%both, false_computation=%cheap",
)


def test_the_body_of_a_loop_is_apart():
    loop = program(WHILE, BRANCHES, DOUBLE)
    assert loop.traffic() == 0
    assert loop.traffic_apart() == 4 * 4096
    assert sum(loop.operations()[kind] for kind in KERNELS) == 0
    assert loop.operations()["while"] == 1


@pytest.mark.parametrize("line", CONDITIONALS)
def test_branches_are_apart_and_the_costliest_counts_with_the_loops_in_it(line):
    branched = program(
        f"%i = s32[] constant(1)\n%y = {MAIN} copy(%x)\n{line.format(main=MAIN)}", BRANCHES, DOUBLE
    )
    assert branched.traffic() == 2 * 4096
    assert branched.traffic_apart() == 4 * 4096
    assert branched.operations()["copy"] == branched.operations()["conditional"] == 1


def test_a_called_computation_runs_in_every_step():
    called = program(
        f"""
        %y = {MAIN} call(%x), to_apply=%costly
        %z = {MAIN} call(%y), to_apply=%both
        """,
        BRANCHES,
        DOUBLE,
    )
    assert called.traffic() == 2 * 4096
    assert called.traffic_apart() == 4 * 4096
    assert called.operations()["copy"] == called.operations()["while"] == 1


# Kernels and collectives.


def test_kernels_are_fusions_reductions_and_copies_that_wait():
    kernels = program(
        """
        %zero = f32[] constant(0)
        %a = f32[] reduce(%x, %zero), dimensions={0,1}, to_apply=%add, metadata={op_name="copy(x)"}
        %b = f32[8,128]{1,0} copy(%x)
        %c = f32[8,128]{1,0} fusion(%b), kind=kInput, calls=%double
        %d = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]) copy-start(%c)
        %e = f32[8,128]{1,0} copy-done(%d)
        %f = f32[] multiply(%a, %a)
        %g = f32[8,128]{1,0} custom-call(%e), custom_call_target="something"
        """,
        DOUBLE,
        ADD,
    ).operations()
    assert {kind: kernels[kind] for kind in KERNELS} == {
        "fusion": 1,
        "copy": 1,
        "reduce": 1,
        "reduce-window": 0,
    }


WRAPPED = f"""
%wrapped (p: f32[8,128]) -> f32[2,128] {{
  %p = {MAIN} parameter(0)
  ROOT %scattered = f32[2,128]{{1,0}} reduce-scatter(%p), dimensions={{0}}, to_apply=%add
}}
"""
COLLECTIVES = {
    "all-reduce": (f"%r = {MAIN} all-reduce(%x), to_apply=%add", {"all-reduce": 1}, 8192),
    "of two arrays": (
        f"%r = ({MAIN}, {MAIN}) all-reduce(%x, %x), to_apply=%add",
        {"all-reduce": 1},
        4 * 4096,
    ),
    "all-reduce-start": (
        f"%s = {MAIN} all-reduce-start(%x), to_apply=%add\n%r = {MAIN} all-reduce-done(%s)",
        {"all-reduce": 1},
        8192,
    ),
    "all-gather": (
        "%r = f32[32,128]{1,0} all-gather(%x), dimensions={0}",
        {"all-gather": 1},
        5 * 4096,
    ),
    "all-gather-start": (
        f"%s = ({MAIN}, f32[32,128]{{1,0}}) all-gather-start(%x), dimensions={{0}}\n"
        "%r = f32[32,128]{1,0} all-gather-done(%s)",
        {"all-gather": 1},
        5 * 4096,
    ),
    "collective-permute-start": (
        f"%s = ({MAIN}, {MAIN}, u32[], u32[]) collective-permute-start(%x)\n"
        f"%r = {MAIN} collective-permute-done(%s)",
        {"collective-permute": 1},
        8192,
    ),
    "reduce-scatter": (
        "%r = f32[2,128]{1,0} reduce-scatter(%x), dimensions={0}, to_apply=%add",
        {"reduce-scatter": 1},
        5 * 1024,
    ),
    "async-start": (
        f"%s = (({MAIN}), f32[2,128]{{1,0}}) async-start(%x), calls=%wrapped\n"
        "%r = f32[2,128]{1,0} async-done(%s)",
        {"reduce-scatter": 1},
        5 * 1024,
    ),
    "in a fusion": (
        "%r = f32[2,128]{1,0} fusion(%x), kind=kCustom, calls=%wrapped",
        {"reduce-scatter": 1},
        5 * 1024,
    ),
    "in a branch": (
        f"%i = pred[] constant(true)\n%r = {MAIN} conditional(%i, %x, %x), "
        "true_computation=%wrapped, false_computation=%wrapped",
        {},
        0,
    ),
}


@pytest.mark.parametrize("case", COLLECTIVES)
def test_a_collective_is_counted_once_in_every_form(case):
    lines, found, moved = COLLECTIVES[case]
    written = program(lines, WRAPPED, ADD)
    assert dict(written.collectives()) == found
    assert written.traffic() == moved


# Programs that XLA compiled.


def compiled(function, *arguments, **options):
    return ProgramText(jax.jit(function, **options).lower(*arguments).compile(JUDGED).as_text())


ROWS = jax.ShapeDtypeStruct((100, 1000), jnp.float32)
SIZE = 400_000


def test_a_product_of_matrices_reads_two_and_writes_one():
    square = jax.ShapeDtypeStruct((300, 300), jnp.float32)
    assert compiled(jnp.matmul, square, square).traffic() == 3 * 360_000


def test_a_row_of_an_array_costs_a_row():
    taken = compiled(lambda x, i: 2 * jax.lax.dynamic_index_in_dim(x, i), ROWS, 3)
    assert taken.traffic() == pytest.approx(2 * 4000, abs=100)

    def put(x, i, row):
        return jax.lax.dynamic_update_index_in_dim(x, row, i, 0)

    changed = compiled(put, ROWS, 3, jnp.ones(1000), donate_argnums=0)
    assert changed.traffic() == pytest.approx(2 * 4000, abs=100)


def test_rounds_of_a_real_loop_are_apart():
    def repeat(x, times):
        return jax.lax.fori_loop(0, times, lambda _, x: jnp.cos(x), x)

    program = compiled(repeat, ROWS, 5, donate_argnums=0)
    assert program.operations()["while"] == 1
    assert program.traffic() < 100
    assert program.traffic_apart() == pytest.approx(2 * SIZE, rel=1e-3)


def test_branches_of_a_real_conditional_are_apart():
    def choose(number, x):
        return jax.lax.switch(number, [jnp.sum, jnp.max, lambda _: jnp.float32(1.0)], x)

    program = compiled(choose, 0, ROWS)
    assert program.operations()["conditional"] == 1
    assert program.traffic() < 100
    assert program.traffic_apart() == pytest.approx(SIZE, rel=1e-2)
