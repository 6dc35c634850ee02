"""Alignment of two tables: who pays for what, and that the game finds the turn."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_methods import values

from data_tools import align_tables
from mmssl import config
from mmssl.build import build_model
from mmssl.check import fake_batch
from mmssl.data.draws import Draws
from mmssl.eval.alignment import quick, refined, translate
from mmssl.rng import row_uniform
from mmssl.specs import AlignmentSpec, RunSpec
from mmssl.tasks.players import Alignment, closer_to_orthogonal
from mmssl.train import run as training
from mmssl.train.engine import session
from mmssl.types import UserError

NAME = "speech/speech_text_alignment"


def alignment(rows=300, width=6, **options):
    torch.manual_seed(0)
    spec = AlignmentSpec(kind="alignment", width=width, **{"hidden": [16], **options})
    tables = torch.randn(2, rows, width)
    return Alignment("alignment", spec, tables[0], tables[1], 0).train()


def test_untrained_both_pay_about_ln_2():
    model = build_model(config.load(NAME)).train()
    got = values(model, fake_batch(model.spec, 64))
    assert got["alignment.critic"] == pytest.approx(math.log(2), abs=0.01)
    assert got["alignment.mapping"] == pytest.approx(math.log(2), abs=0.01)


def test_a_critic_of_zeros_costs_ln_2_and_the_terms_are_those_of_the_formula():
    task = alignment(dropout=0.0, smooth=0.1)
    batch = next(Draws(32, 0, 1))
    terms = task(None, batch)
    u = training_rows(task, batch)
    x, y = task.source_ND[u[0]], task.target_ND[u[1]]
    p = torch.sigmoid(torch.cat([task.critic(task.mapping(x), False), task.critic(y, False)]))
    label = torch.cat([torch.full((32,), 0.9), torch.full((32,), 0.1)])
    for name, said in (("critic", label), ("mapping", 1 - label)):
        want = -(said * p.log() + (1 - said) * (1 - p).log()).mean()
        got = terms[name].sum / terms[name].count
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for p in task.critic.layers[-1].parameters():
        torch.nn.init.zeros_(p)
    for term in task(None, batch).values():
        assert (term.sum / term.count).item() == pytest.approx(math.log(2), abs=1e-6)


def training_rows(task, batch):
    rows = min(task.spec.frequent, len(task.source_ND))
    return (row_uniform(batch.index_B, 2, task.stream) * rows).long().unbind(1)


def test_each_loss_moves_its_own_part_only():
    task = alignment()
    terms = task(None, next(Draws(32, 0, 1)))
    for player, other in (("critic", "mapping"), ("mapping", "critic")):
        task.zero_grad()
        terms[player].sum.backward(retain_graph=True)
        assert all(p.grad is None for p in getattr(task, other).parameters())
        assert all(bool(p.grad.any()) for p in getattr(task, player).parameters())


def test_turns_follow_from_the_number_of_the_step():
    task = alignment(critic_steps=5)
    assert task.weight("critic") == task.weight("mapping") == [1.0, 1.0]
    seen = []
    for step in range(13):
        task.begin(step)
        seen.append(task.turn)
        assert task.weight(task.turn) == [1.0, 1.0]
        assert task.weight("mapping" if task.turn == "critic" else "critic") == [1.0, 0.0]
    assert seen == [*["critic"] * 5, "mapping"] * 2 + ["critic"]


def test_rows_are_the_frequent_ones_and_drawn_evenly():
    task = alignment(rows=50, frequent=10)
    found = training_rows(task, next(Draws(20_000, 0, 1)))
    for rows in found:
        assert rows.bincount(minlength=10).tolist() == pytest.approx([2000] * 10, abs=200)
    assert abs(float(torch.corrcoef(torch.stack(found).float())[0, 1])) < 0.03


def test_the_pull_is_descent_towards_orthogonal_matrices():
    torch.manual_seed(0)
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    ((w.T @ w - torch.eye(5)).square().sum() / 4).backward()
    torch.testing.assert_close(closer_to_orthogonal(w, 0.01), w - 0.01 * w.grad)
    w = torch.linalg.qr(torch.randn(5, 5))[0] + 0.1 * torch.randn(5, 5)
    for _ in range(60):
        w = closer_to_orthogonal(w, 0.1)
    torch.testing.assert_close(w @ w.T, torch.eye(5), atol=1e-4, rtol=0)


def test_it_acts_behind_steps_of_the_mapping_only():
    task = alignment(beta=0.1, critic_steps=1)
    task.mapping.weight.data *= 1.5
    task.begin(0)
    task.after_step(0.0)
    assert torch.equal(task.mapping.weight, 1.5 * torch.eye(6))
    task.begin(1)
    task.after_step(0.0)
    torch.testing.assert_close(task.mapping.weight, (1.1 * 1.5 - 0.1 * 1.5**3) * torch.eye(6))


def test_what_does_not_fit_is_refused(tmp_path):
    table, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"weight": torch.randn(20, 8)}, table)
    save_file({"vectors": torch.randn(20, 8)}, other)
    for options, message in [
        ([f"source={table}"], "has 20 rows; set frequent to that or less"),
        ([f"source={table}", "width=9"], "expected rows of 9 numbers"),
        ([f"target={other}"], "no key `weight`, only vectors"),
        ([f"target={tmp_path / 'c'}"], "no such table of vectors"),
    ]:
        spec = config.load(
            NAME, ["tasks.alignment.width=8", *(f"tasks.alignment.{o}" for o in options)]
        )
        with pytest.raises(UserError, match=message):
            build_model(spec)
    spec = config.load(NAME)
    two = spec.model_copy(
        update={"tasks": {"a": spec.tasks["alignment"], "b": spec.tasks["alignment"]}}
    )
    with pytest.raises(UserError, match="take turns at a step; leave the other tasks out"):
        build_model(two)
    with pytest.raises(UserError, match=r"tasks\.alignment\.source=: no such file"):
        training.open_folder(spec, tmp_path / "run")
    with pytest.raises(UserError, match="leave `towers` and `views` empty"):
        config.load(NAME, ["views={x: {modality: audio}}"])
    with pytest.raises(ValueError, match="need one entry at least"):
        RunSpec.model_validate({"name": "none", "towers": {}, "views": {}, "tasks": {}})


def tables_of(tmp_path):
    """Words in ten clusters of unlike sizes; the same turned far, shuffled, with a little noise."""
    g = torch.Generator().manual_seed(0)
    which = torch.multinomial(1 / torch.arange(1, 11).float(), 400, True, generator=g)
    centres = torch.randn(10, 5, generator=g) * torch.linspace(2, 0.3, 5)
    x = centres[which] + 0.5 * torch.randn(400, 5, generator=g)
    skew = torch.randn(5, 5, generator=g)
    skew = skew - skew.T
    turn = torch.linalg.matrix_exp(1.6 * skew / torch.linalg.matrix_norm(skew, 2))
    order = torch.randperm(400, generator=g)
    y = (x @ turn.T + 0.02 * torch.randn(400, 5, generator=g))[order]
    files = [tmp_path / "speech.safetensors", tmp_path / "text.safetensors"]
    for file, table in zip(files, (x, y), strict=True):
        save_file({"weight": table.contiguous()}, file)
    return files, turn, order.argsort()


@pytest.mark.slow
def test_the_game_finds_the_turn_without_pairs(tmp_path, capsys):
    (speech, text), turn, theirs = tables_of(tmp_path)
    task = {"source": speech, "target": text, "width": 5, "frequent": 400, "hidden": "[64]"}
    task |= {"critic_steps": 3, "beta": 0.01}
    options = [f"tasks.alignment.{k}={v}" for k, v in task.items()]
    train = {"steps": 1400, "batch": 64, "log_every": 700, "save_every": 0}
    options += [f"train.{k}={v}" for k, v in train.items()]
    out = tmp_path / "run"
    spec = config.load(NAME, [*options, "optim.lr=1.0", "validate.every=700", f"out={out}"])
    start = build_model(spec)
    with session(threads=1) as device:
        assert training.start(spec, device) == 0
    align_tables.main(str(out), str(tmp_path / "map.safetensors"))

    (begun,) = start.tasks.values()
    x, y = begun.source_ND, begun.target_ND

    def right(w):
        return float((translate(x @ w.T, y)[0] == theirs).float().mean())

    assert right(refined(torch.eye(5), x, y)) < 0.1  # Procrustes alone finds nothing
    learned = load_file(next(out.glob("best/*/weights.safetensors")))
    w = learned["tasks.alignment.mapping.weight"]
    assert right(w) > 0.9
    assert float((w.T @ w - torch.eye(5)).abs().max()) < 0.3
    found = load_file(tmp_path / "map.safetensors")
    assert (found["translation"] == theirs).float().mean() > 0.97
    torch.testing.assert_close(found["weight"], turn, atol=0.02, rtol=0)
    start.load_state_dict(learned, strict=False)
    assert quick(start)["alignment.csls"] > quick(build_model(spec))["alignment.csls"] + 0.02
    assert "refined" in capsys.readouterr().out


def test_other_runs_are_not_aligned(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        align_tables.main(str(tmp_path), str(tmp_path / "map.safetensors"))
