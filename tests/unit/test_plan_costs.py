"""What `mmssl plan` says follows from its formulas."""

from typing import get_args

import pytest
from small_methods import shrinking, small

from mmssl import config, plan
from mmssl.plan import PlanOptions, memory, step_seconds
from mmssl.stages import plan as stages_of
from mmssl.trace import Sizes, Trace
from mmssl.train.flops import GPUS
from mmssl.types import UserError

MILLION = 10**6
SIZE = Sizes(parameters=1000 * MILLION, trained=900 * MILLION, buffers=5 * MILLION)
WORK = Trace(flops=3e12, kept=2e9, peak=3e9)
BUCKET = 4 * 50 * MILLION  # bytes of `reduce_bucket_size` in configs/deepspeed


def spec_of(*overrides):
    return config.load("general/mae", overrides)


@pytest.mark.parametrize("ranks", [1, 4, 64])
def test_memory_falls_with_the_stage_as_published(ranks):
    """Bytes per number: 4 + 8 at stage 0; what is cut is a W-th; DeepSpeed's copy adds 4 / W."""
    spec, whole, trained = spec_of("optim.ema=0"), 4000 * MILLION, 3600 * MILLION
    found = [memory(spec, stage, ranks, SIZE, WORK) for stage in range(4)]
    share = trained / ranks
    assert [m.weights for m in found] == [whole] * 3 + [whole / ranks + (whole if ranks > 1 else 0)]
    assert [m.optimiser for m in found] == [2 * trained, 3 * share, 3 * share, 3 * share]
    assert [m.averaged for m in found] == [0] * 4
    assert [m.buffers for m in found] == [5 * MILLION] * 4
    backward = [3e9, 3e9, 2e9 + share + 2 * BUCKET, 2e9 + share + BUCKET]
    assert [m.backward for m in found] == pytest.approx(backward)
    one = max(trained + BUCKET + share, 4 * share)
    step = [2 * trained, one, 4 * share, 4 * share + BUCKET]
    assert [m.step for m in found] == pytest.approx(step)
    for m in found:
        static = m.weights + m.optimiser + m.buffers
        assert m.peak == pytest.approx(static + max(m.backward, m.step))
    assert (found[2].peak < found[1].peak < found[0].peak) == (ranks > 1)


def test_averaged_weights_and_earlier_micro_batches_take_their_place():
    spec = spec_of("optim.ema=0.999", "train.accumulate=2")
    found = [memory(spec, stage, 4, SIZE, WORK) for stage in range(4)]
    trained = 3600 * MILLION
    assert [m.averaged for m in found] == [trained] * 3 + [trained / 4]
    assert found[0].backward == WORK.peak + trained
    assert found[3].backward == WORK.kept + trained / 4 + BUCKET


def test_a_step_takes_its_work_at_the_stated_share_of_the_peak():
    options = PlanOptions(gpus=4, gpu="h100", utilisation=0.5)
    wide, narrow = spec_of("optim.ema=0"), spec_of("optim.ema=0.9", "train.precision=bf16")
    traffic = 900 * MILLION / 3.35e12
    assert step_seconds(wide, options, 0, SIZE, WORK) == pytest.approx(
        3e12 / (0.5 * 67e12) + 28 * traffic
    )
    assert step_seconds(narrow, options, 2, SIZE, WORK) == pytest.approx(
        3e12 / (0.5 * 989e12) + 40 * traffic / 4
    )


def test_the_options_know_the_gpus_of_the_table():
    assert get_args(PlanOptions.model_fields["gpu"].annotation) == tuple(GPUS)
    assert GPUS["h200"].bytes > GPUS["h100"].bytes
    assert GPUS["h100"].bf16_flops == pytest.approx(989e12)


def rows_of(text):
    return {line.split("  ")[0]: line.split()[1:] for line in text.splitlines() if "  " in line}


def test_the_report_has_every_number(capsys):
    name = "general/mae"
    words = [*shrinking(config.load(name)), "train.batch=8", "optim.ema=0", "gpus=2", "gpu=a100"]
    plan.main(name, [*words, "samples=72000", "price=3", "utilisation=0.25"])
    out = capsys.readouterr().out
    spec = small(name, "train.batch=8")
    assert f"{spec.name}: " in out
    assert "2 x a100, 4 rows per GPU" in out
    for stage in range(4):
        for kind in ("kept", "recomputed"):
            assert f"ZeRO {stage}, activations {kind}" in out
    flops, seconds, rate, samples, hours, total, cost = rows_of(out)["kept"]
    assert float(samples) == 72000
    assert float(rate) == pytest.approx(8 / float(seconds), rel=0.01)
    assert float(hours) == pytest.approx(9000 * float(seconds) / 3600, rel=0.01)
    assert float(total) == pytest.approx(2 * float(hours), rel=0.01)
    assert cost == f"{float(total) * 3:,.0f}"
    work = 4 * float(flops) * 1e9 / (0.25 * 19.5e12)
    assert work < float(seconds) < 1.2 * work + 1e-3


def test_a_convolutional_run_has_nothing_to_recompute(capsys):
    plan.main("av/ave_net", [*shrinking(config.load("av/ave_net")), "train.batch=8"])
    out = capsys.readouterr().out
    assert "recomputed" not in out
    assert "give price=" in out


def test_text_without_a_tokenizer_is_said(capsys):
    plan.main("general/bert", [*shrinking(config.load("general/bert")), "train.batch=8"])
    assert "vocabulary of 512 ids" in capsys.readouterr().out


def test_every_run_of_a_file_with_stages_is_planned(capsys):
    stages = [stage for stage in stages_of("hubert") if stage.run is not None]
    small_words = [f"{s.name}.{text}" for s in stages for text in shrinking(s.run)]
    plan.main("hubert", [*small_words, "gpus=1"])
    out = capsys.readouterr().out
    assert [out.count(f"{s.run.name}: ") > 0 for s in stages] == [True] * len(stages)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpus=3", "train.batch=8"], r"train\.batch=8 does not divide by 3 processes"),
        (["gpu=v100"], r"`gpu=v100`"),
        (["utilisation=2"], r"`utilisation=2`"),
        (["gpus=1", "gpus=2"], r"given twice"),
        (["gpuz=1"], r"gpuz"),
    ],
)
def test_bad_words_are_named(words, message):
    with pytest.raises(UserError, match=message):
        plan.main("general/mae", words)
