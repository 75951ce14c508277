"""Steps for accelerators are compiled and judged right; here for CPU devices, in their place."""

import json

import accelerators
import jax
import numpy as np
import pytest
from accelerators import AGC, AUTO, FSDP, GLOBAL, GPT24, GPT185, H100, MLP, NONE, SKIP, V5E
from jax.sharding import Mesh, PartitionSpec


@pytest.fixture
def on_cpu(monkeypatch):
    """CPU devices in place of those that are described."""
    monkeypatch.setattr(accelerators, "set_up", lambda: "Compiled by XLA.")
    monkeypatch.setattr(accelerators, "describe", lambda _, count: jax.devices()[:count])
    # Optax's optimizers promote implicitly.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def mesh(count):
    return Mesh(np.array(jax.devices()[:count]), ("devices",))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 12), (None, "devices")),
        ((8, 13), ("devices", None)),
        ((3, 3), (None, None)),
        ((16,), ("devices",)),
        ((), ()),
    ],
)
def test_an_array_is_split_along_the_longest_axis_that_four_divides(shape, spec):
    assert accelerators.split(shape, mesh(4)).spec == PartitionSpec(*spec)
    assert accelerators.split(shape, mesh(1)).is_fully_replicated


def test_what_reads_a_gradient_again_is_apart_from_what_runs_in_every_step(on_cpu):
    alone, auto = (accelerators.measure(V5E, MLP, 1, name, False) for name in (NONE, AUTO))
    # Gradient, parameters and two moments are read; all but the gradient are written.
    assert alone.traffic >= 7
    assert alone.apart == alone.loops == 0
    assert auto.loops >= 1
    assert auto.apart > 1


def test_over_four_devices_each_reads_its_quarter_and_the_norm_is_one_sum_over_all(on_cpu):
    one, four = (accelerators.measure(H100, MLP, count, GLOBAL, False) for count in (1, FSDP))
    assert four.traffic == pytest.approx(one.traffic, rel=0.1)
    assert one.collectives == {}
    assert set(four.collectives) == {"all-reduce"}


def test_buffers_that_are_given_to_other_arrays_than_their_own_are_copied(on_cpu):
    own, other = (accelerators.measure(H100, MLP, 1, NONE, swap) for swap in (False, True))
    # At least two for each of the six parameters.
    assert own.copies + 12 <= other.copies
    assert own.traffic + 4 <= other.traffic


def test_the_program_prints_a_row_for_each_clipper_and_writes_them(
    on_cpu, monkeypatch, capsys, tmp_path
):
    words = ["--quick", "--clippers", "autoclip(90)", "clip_by_global_norm", "--devices", "h100"]
    monkeypatch.setattr("sys.argv", ["accelerators.py", *words, f"--out={tmp_path}"])
    accelerators.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Python 3")
    assert lines[3] == "MLP, h100, adam: 6,792 parameters in 6 leaves"
    assert [line.split()[0] for line in lines[5:7]] == ["clip_by_global_norm(1)", "autoclip(90)"]
    figures = json.loads((tmp_path / "accelerators.json").read_text())
    assert [row["clipper"] for row in figures["rows"]] == ["clip_by_global_norm(1)", "autoclip(90)"]
    (target,) = figures["targets"]
    kernels = [row["kernels"] for row in figures["rows"]]
    assert target["value"] == kernels[1] - kernels[0]
    assert target["met"] == (target["value"] <= 8)


def test_options_leave_what_has_one_of_the_words_in_its_name():
    cells = accelerators.select_cells(["mlp", "fsdp"], ["agc"], quick=False)
    assert cells[MLP, 1] == (AGC,)
    assert {model for model, count in cells if count == 1} == {MLP}
    assert set(accelerators.select_cells(None, None, quick=True)) == {(MLP, 1)}


def row(device, clipper, **figures):
    zero = dict.fromkeys(accelerators.Row._fields, 0.0)
    fields = {"device": device, "model": GPT185, "count": 1, "clipper": clipper, "collectives": {}}
    return accelerators.Row(**{**zero, **fields, **figures})


@pytest.mark.parametrize(("device", "allowed"), [(V5E, 1.15), (H100, 1.0)])
def test_targets_compare_a_clipper_with_the_optimizer_alone(device, allowed):
    def verdicts(extra):
        rows = [
            row(device, NONE, traffic=7.0),
            row(device, AUTO, traffic=7.0 + extra),
            row(device, SKIP, traffic=8.0, temp=0.31),
        ]
        return {target.text: target.met for target in accelerators.check_targets(rows)}

    within, beyond = verdicts(allowed + 0.004), verdicts(allowed + 0.02)
    (ours,) = (text for text in within if text.startswith(AUTO))
    assert within[ours]
    assert not beyond[ours]
    # The memory of `skip_spikes` is too much, its traffic is not.
    assert sorted(within.values()) == [False, True, True]


def test_targets_of_four_devices_allow_the_collectives_of_clip_by_global_norm():
    def met(**collectives):
        four = {"model": GPT24, "count": FSDP}
        rows = [
            row(V5E, GLOBAL, **four, collectives={"all-reduce": 1}),
            row(V5E, AUTO, **four, collectives=collectives),
        ]
        return [target.met for target in accelerators.check_targets(rows)]

    assert met(**{"all-reduce": 1}) == [True, True]
    assert met(**{"all-reduce": 2}) == [False, True]
    assert met(**{"all-reduce": 1, "all-gather": 1}) == [True, False]
