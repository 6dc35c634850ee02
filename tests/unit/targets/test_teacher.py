"""The teacher: closed form of the average, no gradient, state, evaluation mode."""

import torch
from torch import nn

from mmssl.backbones.transformer import Transformer
from mmssl.specs import Schedule
from mmssl.targets.teacher import Teacher


def pair(decay=0.9, **options):
    torch.manual_seed(0)
    student = Transformer(16, 2, head_size=8, hidden=32, **options)
    return student, Teacher(student, decay)


def moved(student, by):
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(by)


def test_a_teacher_starts_as_its_student_and_follows_the_closed_form():
    student, teacher = pair(0.9)
    x = torch.randn(2, 5, 16)
    assert torch.equal(teacher.twin(x)[0], student.eval()(x)[0])
    start = {k: v.clone() for k, v in teacher.twin.state_dict().items()}
    for _ in range(3):
        moved(student, 1.0)
        teacher.update(0.5)
    # the student stood at +1, +2, +3
    lead = 0.1 * (1 * 0.81 + 2 * 0.9 + 3)
    for name, value in teacher.twin.state_dict().items():
        torch.testing.assert_close(value, start[name] + lead, atol=1e-5, rtol=1e-5)


def test_the_lag_is_the_distance_of_the_weights():
    student, teacher = pair(0.9)
    assert teacher.lag == 0
    start = torch.cat([p.detach().flatten() for p in student.parameters()])
    moved(student, 1.0)
    teacher.update(0.5)
    expected = 0.9 * len(start) ** 0.5 / (start + 1.0).norm()
    torch.testing.assert_close(teacher.lag, expected, atol=0, rtol=1e-5)
    student, teacher = pair(0.0)
    moved(student, 1.0)
    teacher.update(0.5)
    assert teacher.lag == 0


def test_decay_follows_its_schedule():
    student, teacher = pair(Schedule(kind="linear", start=1.0, end=0.0))
    before = teacher.twin.state_dict()["blocks.0.norm1.parts.shared.weight"].clone()
    moved(student, 1.0)
    teacher.update(0.0)
    same = teacher.twin.state_dict()["blocks.0.norm1.parts.shared.weight"]
    assert torch.equal(same, before)
    teacher.update(1.0)
    assert all(
        torch.equal(v, student.state_dict()[k]) for k, v in teacher.twin.state_dict().items()
    )


def test_a_teacher_has_no_parameters_but_is_saved():
    student, teacher = pair()
    assert list(teacher.parameters()) == []
    assert set(teacher.twin.state_dict()) == set(student.state_dict())
    assert all(v.ndim > 0 for v in teacher.state_dict().values())
    x = torch.randn(1, 3, 16, requires_grad=True)
    teacher.twin(x)[0].sum().backward()
    assert all(p.grad is None for p in student.parameters())


def test_a_teacher_never_drops_out():
    student, teacher = pair(dropout=0.5)
    holder = nn.ModuleList([student, teacher]).train()
    assert student.training
    x = torch.randn(2, 5, 16)
    assert torch.equal(holder[1].twin(x)[0], holder[1].twin(x)[0])


def test_a_teacher_that_follows_reads_its_own_batch_while_the_model_trains():
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = Teacher(student, 0.9, follows=True)
    x = 5 + 3 * torch.randn(64, 3)
    torch.testing.assert_close(teacher.twin(x).mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    holder = nn.ModuleList([student, teacher])
    holder.eval()
    assert float(teacher.twin(x).mean(0).abs().max()) > 0.1
    holder.train()
    assert all(part.training for part in teacher.modules())


def test_statistics_belong_to_the_weights_whose_outputs_they_describe():
    """In evaluation a teacher far behind its student still gives normalised outputs."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher, plain = Teacher(student, 1.0, follows=True), Teacher(student, 1.0)
    x = 5 + 3 * torch.randn(64, 3)
    with torch.no_grad():
        student[0].bias += 10.0
    for _ in range(100):
        student(x), teacher.twin(x)
        teacher.update(0.5)
    plain.update(0.5)
    assert torch.equal(plain.twin.get_buffer("1.running_mean"), student[1].running_mean)
    teacher.train(False)
    torch.testing.assert_close(teacher.twin(x).mean(0), torch.zeros(4), atol=1e-3, rtol=0)
