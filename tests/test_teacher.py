"""Teachers that are not in memory, or not the model that the run began with."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from compress.calibration import Windows
from compress.checkpoint import Checkpoint
from compress.distill.logit_kd import LogitKD
from compress.distill.losses import forward_kl
from compress.errors import BadInput, CompressError
from compress.manifest import Manifest
from compress.methods import build
from compress.progress import silent
from compress.signals import signal_of
from compress.teacher import CachedTeacher, cached_teacher, keep_predictions
from compress.train import train
from compress.train_pass import Batch
from compress.training_stage import _Lesson
from compress.weights import Dense

VOCABULARY = 96


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(0, VOCABULARY, (24, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    signal = signal_of(model, batch)
    return signal.head(signal.hidden)


def kept(model: PreTrainedModel, windows: Tensor, n_kept: int, directory: Path) -> CachedTeacher:
    keep_predictions(model, windows, n_kept, directory / "teacher.safetensors", silent)
    return CachedTeacher(directory / "teacher.safetensors")


def read(teacher: CachedTeacher, batch: Batch) -> Tensor:
    signal = teacher.signal(batch)
    return torch.cat([signal.head(rows) for rows in signal.hidden.split(7)])


def test_all_tokens_kept_are_the_logits_themselves(model, windows, tmp_path):
    rows = torch.tensor([5, 0, 17])
    counted = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    teacher = kept(model, windows, VOCABULARY + 5, tmp_path)
    for chosen in (None, counted):
        batch = Batch(windows[rows], chosen, rows=rows)
        torch.testing.assert_close(read(teacher, batch), logits_of(model, batch), rtol=0, atol=1e-5)


def test_few_tokens_kept_bound_the_error(model, windows, tmp_path):
    """What is documented: the kept ones to half precision, the rest even, and the bounds of loss and gradient."""
    batch, n_kept = Batch(windows, rows=torch.arange(24)), 8
    p = logits_of(model, batch).log_softmax(-1)
    read_back = read(kept(model, windows, n_kept, tmp_path), batch)
    torch.testing.assert_close(read_back.exp().sum(-1), torch.ones(len(p)), rtol=0, atol=2e-3)
    values, indices = p.topk(n_kept)
    torch.testing.assert_close(read_back.gather(1, indices), values, rtol=2**-10, atol=1e-6)
    others = read_back.scatter(1, indices, 0.0)
    tail = 1 - values.exp().sum(-1)
    torch.testing.assert_close(others.min(-1).values.exp() * (VOCABULARY - n_kept), tail, rtol=1e-3, atol=1e-5)

    q = torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    gradients = []
    for teacher in (p, read_back):
        (gradient,) = torch.autograd.grad(forward_kl(q, teacher).sum(), q)
        gradients.append(gradient)
    rounding = 2e-3
    assert ((gradients[0] - gradients[1]).abs().sum(-1) <= 2 * tail + rounding).all()
    outside = q.detach().log_softmax(-1).scatter(1, indices, torch.nan)
    spread = outside.nan_to_num(-1e9).amax(-1) - outside.nan_to_num(1e9).amin(-1)
    difference = forward_kl(q, p) - forward_kl(q, read_back)
    assert (difference <= tail * (torch.tensor(VOCABULARY - n_kept).log() + spread) + 0.02).all()
    assert (difference >= -tail * spread - 0.02).all()


def fit(model, teacher, windows, directory, **settings):
    student = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    student.load_state_dict(model.state_dict())
    names = [name for name, module in student.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    weights = {}
    for name in names:
        matrix = student.get_submodule(name).weight.data
        weights[name] = Dense(matrix).masked(matrix.abs() > matrix.abs().median())
        student.get_submodule(name).weight.data = weights[name].dense()
    step = LogitKD(**{"steps": 6, "batch_size": 4, "learning_rate": 1e-2} | settings)
    return train(student, weights, teacher, windows, step, seed=0, device="cpu", directory=directory, progress=silent)


def test_training_from_the_cache(model, windows, tmp_path):
    resident = fit(model, model, windows, tmp_path / "resident")
    exact = fit(model, kept(model, windows, VOCABULARY, tmp_path), windows, tmp_path / "exact")
    torch.testing.assert_close(torch.tensor(exact.history), torch.tensor(resident.history), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(exact.held_out), torch.tensor(resident.held_out), rtol=1e-4, atol=0)
    few = fit(model, kept(model, windows, 16, tmp_path), windows, tmp_path / "few")
    assert few.history[-1] < few.history[0]
    assert few.history != resident.history


def test_many_students_share_one_pass_of_the_teacher(model, windows, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))

    def unwanted() -> PreTrainedModel:
        raise AssertionError("the teacher was loaded again")

    first = cached_teacher("digest", windows, 4, lambda: model, silent)
    second = cached_teacher("digest", windows, 4, unwanted, silent)
    batch = Batch(windows[:2], rows=torch.arange(2))
    assert torch.equal(read(first, batch), read(second, batch))
    (file,) = (tmp_path / "teachers").iterdir()
    assert file.stat().st_size == pytest.approx(24 * 15 * (4 * (2 + 4) + 4), abs=400)
    for digest, other, n_kept in (("other", windows, 4), ("digest", windows.flip(0), 4), ("digest", windows, 5)):
        with pytest.raises(AssertionError, match="loaded again"):
            cached_teacher(digest, other, n_kept, unwanted, silent)


def test_an_interrupted_pass_of_the_teacher_leaves_nothing(model, windows, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.teacher._TOKENS_PER_FORWARD", 64)

    def stop(done: int, total: int, message: str) -> None:
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep_predictions(model, windows, 4, tmp_path / "teacher.safetensors", stop)
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_padded_otherwise(model, windows, tmp_path):
    """The same model with more rows in its tables teaches the same."""
    padded = AutoModelForCausalLM.from_config(LlamaConfig(**model.config.to_dict() | {"vocab_size": 128}), dtype=torch.float32)
    state = {n: torch.cat([t, torch.randn(32, 32)]) if t.shape[0] == VOCABULARY else t for n, t in model.state_dict().items()}
    padded.load_state_dict(state)
    expected = fit(model, model, windows, tmp_path / "same").history
    torch.testing.assert_close(fit(model, padded, windows, tmp_path / "padded").history, expected, rtol=1e-4, atol=1e-6)
    cached = kept(padded, windows, 128, tmp_path)
    torch.testing.assert_close(fit(model, cached, windows, tmp_path / "cached").history, expected, rtol=1e-4, atol=1e-6)


def test_another_checkpoint_teaches_through_the_cache(llama, make_checkpoint, run_stages, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    other = make_checkpoint("llama", vocab_size=264, hidden_size=96)
    settings = {"steps": 4, "batch_size": 2, "length": 16, "teacher": str(other), "evaluate_every": 2}
    artifacts = [run_stages(llama, ["wanda", LogitKD(**settings, **more)]) for more in ({}, {"cache": 264})]
    resident, cached = (Manifest.read(artifact).steps[-1].training for artifact in artifacts)
    assert [done for done, _ in resident["held_out"]] == [0, 2, 4] and resident["steps"] == 4
    assert resident["held_out_loss"] == resident["held_out"][-1][1]
    assert cached["held_out_loss"] == pytest.approx(resident["held_out_loss"], rel=1e-3)
    assert Manifest.read(artifacts[0]).steps[0].training is None
    assert len(list((tmp_path / "teachers").iterdir())) == 1


def test_what_cannot_teach_is_refused(llama, make_checkpoint, run_stages, tmp_path):
    stranger = tmp_path / "stranger"
    shutil.copytree(make_checkpoint("llama"), stranger)
    content = json.loads((stranger / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    first, second = list(words)[10:12]
    words[first], words[second] = words[second], words[first]
    (stranger / "tokenizer.json").write_text(json.dumps(content))
    settings = {"steps": 2, "batch_size": 2, "length": 16}
    with pytest.raises(BadInput, match="cannot teach this model: its tokenizer has other tokens"):
        run_stages(llama, [LogitKD(**settings, teacher=str(stranger))])
    narrow = make_checkpoint("llama", max_position_embeddings=12)
    with pytest.raises(BadInput, match="longer than the 12 positions"):
        run_stages(llama, [LogitKD(**settings, teacher=str(narrow))])
    with pytest.raises(BadInput, match="no-such-model"):
        run_stages(llama, [LogitKD(**settings, teacher=str(tmp_path / "no-such-model"))])
    for settings in ({"cache": 4}, {"correct": 4}):
        with pytest.raises(BadInput, match="has no teacher"):
            build("fine_tune", settings)


class Writes(LogitKD):
    """One for which a model writes."""

    def prepare(self, batch, rollouts):
        return batch


def test_a_pass_for_which_models_write_needs_its_teacher_in_memory():
    with pytest.raises(ValueError, match="more than can be kept on disk"):
        Writes(cache=8)


def test_plan_advises_on_the_gap_between_teacher_and_student(cli, make_checkpoint, llama):
    """Numbers that the advice names are sizes a factor of 2.5 apart."""
    large = make_checkpoint("llama", hidden_size=192, intermediate_size=336)
    near, far = (cli("plan", llama, f"logit_kd:teacher={path}", "--json") for path in (llama, large))
    assert near.code == far.code == 0
    warnings = json.loads(near.out)["warnings"], json.loads(far.out)["warnings"]
    assert warnings[0] == [] and len(warnings[1]) == 1
    ladder = warnings[1][0].partition("in stages (")[2].partition(")")[0].split(" -> ")
    sizes = [float(size.removesuffix("M")) for size in ladder]
    assert len(sizes) > 2 and sizes == sorted(sizes, reverse=True)
    assert all(first / second <= 2.52 for first, second in pairwise(sizes))


def test_plan_knows_what_training_needs(cli, make_checkpoint):
    source = make_checkpoint("llama", num_hidden_layers=4)

    def planned(settings: str) -> tuple[int, float]:
        outcome = cli("plan", source, f"logit_kd:batch_size=64,length=128{settings}", "--json")
        plan = json.loads(outcome.out)
        return plan["peak_bytes"], plan["seconds"]

    plain = planned("")
    assert planned(",checkpointing=true")[0] < 0.7 * plain[0]
    assert planned(",accumulate=8")[0] < 0.5 * plain[0]
    assert planned(",cache=8")[0] < plain[0] < planned(",patience=2")[0]


def test_a_corrected_teacher_is_trained_once_and_leaves_a_trace(llama, run_stages, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    settings = {"steps": 6, "batch_size": 2, "length": 16, "learning_rate": 3e-3, "evaluate_every": 3, "hold_out": 0.2}
    corrected = LogitKD(**settings, correct=20)
    cached = corrected.model_copy(update={"cache": 264})
    said = []

    def listen(done: int, total: int, message: str) -> None:
        said.append(message)

    runs = [run_stages(llama, ["wanda", step], progress=listen) for step in (corrected, cached)]
    assert sum(message.startswith("teacher: ") for message in said) >= 40
    said.clear()
    runs += [run_stages(llama, ["wanda", step], progress=listen) for step in (cached, LogitKD(**settings))]
    assert not any(message.startswith("teacher: ") for message in said)  # what it predicts is known
    training = [Manifest.read(each).steps[-1].training for each in runs]
    losses = [dict(found["held_out"]) for found in training]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[1] == losses[2]
    assert losses[0][0] != pytest.approx(losses[3][0], rel=0.02)  # another teacher: another distance to begin with
    own = training[0]["teacher"]
    assert own["held_out_loss"] == min(loss for _, loss in own["held_out"]) and training[1]["teacher"] == own
    assert "teacher" not in training[2] and "teacher" not in training[3]
    assert len(list((tmp_path / "teachers").iterdir())) == 1
    run_stages(llama, ["wanda", cached.model_copy(update={"correct": 10})])
    assert len(list((tmp_path / "teachers").iterdir())) == 2


def test_a_correction_that_helps_nobody(llama, run_stages, caplog):
    settings = {"steps": 2, "batch_size": 2, "length": 16, "hold_out": 0.2, "correct": 4}
    spoilt = Manifest.read(run_stages(llama, [LogitKD(**settings, learning_rate=100.0)])).steps[-1].training["teacher"]
    assert spoilt["steps"] == 0 and "no step of the correction made the teacher better" in caplog.text


def test_what_a_correction_takes_over():
    step = LogitKD(steps=2, batch_size=4, learning_rate=3e-3, correct=30, hold_out=0.25, trains="everything")
    assert step.n_windows == 30 * 4 + 40 and LogitKD(steps=40, correct=30, batch_size=4, hold_out=0).n_windows == 160
    tuned = build("fine_tune", step.correction(200))
    assert (tuned.steps, tuned.trains, tuned.learning_rate, tuned.patience) == (30, "everything", 3e-3, 30)
    assert build("fine_tune", step.correction(7)).patience is None  # too few windows to judge by
    assert build("fine_tune", LogitKD(correct=3, trains="scales").correction(9)).trains == "blocks"


def test_a_teacher_that_is_corrected_learns_the_text(model, windows, tmp_path):
    """What the stage gives its student as a teacher is the model as its own training left it."""
    source = tmp_path / "source"
    model.save_pretrained(source)
    tokens = windows[:, :1] + torch.arange(16) % 3  # something that can be learnt
    data = Windows(tokens % VOCABULARY, "digest", "made here")
    step = LogitKD(steps=2, batch_size=4, learning_rate=1e-2, correct=30, hold_out=0.25)

    def loss(teacher: PreTrainedModel) -> float:
        return teacher(input_ids=data.tokens, labels=data.tokens).loss.item()

    def teacher(step: LogitKD) -> PreTrainedModel:
        found = _Lesson(Checkpoint.open(source), step, data, tmp_path / "work", 0, "cpu").teacher(silent)
        assert isinstance(found, PreTrainedModel)
        return found

    original, corrected, again = teacher(step.model_copy(update={"correct": 0})), teacher(step), teacher(step)
    assert loss(original) == pytest.approx(loss(model), rel=1e-5) and loss(corrected) < 0.7 * loss(original)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in corrected.state_dict().items())
    with pytest.raises(CompressError, match=r"logit_kd.*when the teacher was corrected: "):
        teacher(step.model_copy(update={"learning_rate": 1e30}))
