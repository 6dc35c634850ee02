"""`Model` = towers + tasks: a batch to one scalar and a report.

Letters: B rows, D width, T time bins, S cells of a bin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl import dist
from mmssl.frontends.augment import SpectrumAugment
from mmssl.frontends.spectra import Spectrum
from mmssl.heads.dense import Dense, MapScore, Parts
from mmssl.schedules import resolve
from mmssl.specs import RunSpec
from mmssl.targets.base import Stats
from mmssl.targets.teacher import evaluating
from mmssl.tasks.base import Task, mixed_in
from mmssl.tasks.classify import Match
from mmssl.tasks.masked import Masked
from mmssl.tasks.players import Players
from mmssl.towers import AnyTower, JointTower, Passes
from mmssl.types import Batch, Floor, Term, UserError
from mmssl.views import mel
from mmssl.views.mix import mix_view

Space = tuple[str, str]  # modality and name
_TABLES = {"positions", "extra", "kinds", "prototypes"}


@dataclass(frozen=True)
class ParamPolicy:
    """How the optimiser treats one parameter."""

    lr_scale: float
    decay: bool
    frozen: bool
    constant_lr: bool = False


class Model(nn.Module):
    """The only module the training engine sees.

    augments: what is done to spectrograms in training, by tower.
    towers, joints, trunk: the encoders; a shared trunk is registered here, once. tower_of: view ->
    tower. `last_embeddings` holds the last training step's vectors by name for the health monitors.
    """

    def __init__(
        self,
        spec: RunSpec,
        towers: Mapping[str, AnyTower],
        joints: Mapping[str, JointTower],
        trunk: nn.Module | None,
        tasks: Mapping[str, Task],
        augments: Mapping[str, SpectrumAugment],
    ) -> None:
        super().__init__()
        self.spec = spec
        self.augments = nn.ModuleDict(augments)
        self.towers = nn.ModuleDict(towers)
        self.joints = nn.ModuleDict(joints)
        self.trunk = trunk
        self.tasks = nn.ModuleDict(tasks)
        self._policy: dict[str, tuple[float, bool]] = {}
        self.tower_of = {name: v.tower_name for name, v in spec.views.items()}
        self.last_embeddings: dict[str, Tensor] = {}
        self.last_tokens = 0

    def forward(self, batch: Batch, step: int, total: int) -> tuple[Tensor, dict[str, Term]]:
        """Loss of the local rows and detached terms summed over ranks.

        The loss of a term is world size x local sum / global count: the engine averages gradients
        over ranks, which then gives exactly the gradient of global sum / global count. A term
        without any row is 0; where that is as it should be, because its task rests, the report
        leaves it out.
        """
        need_tasks(self.spec)
        self.turn(step)
        batch = self._augmented(self._mixed(batch), step / max(1, total))
        passes = self.passes(batch, step / max(1, total))
        terms = {
            _join(task_name, name): (term, weight)
            for task_name, task in self.tasks.items()
            for name, (term, weight) in self._weighted(task, passes, batch).items()
        }
        sums = torch.stack([t.sum.detach().double().reshape(()) for t, _ in terms.values()])
        counts = torch.stack([t.count.detach().double().reshape(()) for t, _ in terms.values()])
        sums, counts = dist.sum_over_ranks(torch.stack([sums, counts]))
        loss = sums.new_zeros((), dtype=torch.float32)
        for (term, weight), count in zip(terms.values(), counts, strict=True):
            factor = weight * dist.world_size() / count.clamp(min=1.0)
            loss = loss + term.sum.reshape(()).float() * factor.float()
        resting = self.resting()
        report = {
            name: Term(sums[i : i + 1], counts[i : i + 1])
            for i, name in enumerate(terms)
            if name.split(".")[0] not in resting
        }
        self._remember(passes)
        return loss, report

    def turn(self, step: int) -> str:
        """Tell the tasks which step comes; returns whose it is among players, if there are any."""
        for task in self.tasks.values():
            task.begin(step)  # type: ignore[operator]
        return next((task.turn for task in self.tasks.values() if isinstance(task, Players)), "")

    def resting(self) -> list[str]:
        """Tasks that no row has a part in yet, as it should be; on every rank the same."""
        return [name for name, task in self.tasks.items() if task.resting]

    def players(self) -> dict[str, str]:
        """{parameter: the player who trains it}, in the order of their turns; empty without any."""
        for name, task in self.tasks.items():
            if isinstance(task, Players):
                *others, last = task.rounds
                owns = {f"tasks.{name}.{player}.": player for player in others}
                found = {
                    p: next((who for start, who in owns.items() if p.startswith(start)), last)
                    for p, _ in self.named_parameters()
                }
                return found
        return {}

    def _weighted(
        self, task: nn.Module, passes: Passes, batch: Batch
    ) -> dict[str, tuple[Term, float]]:
        assert isinstance(task, Task)
        return {
            name: (term, prod(resolve(w, passes.position) for w in task.weight(name)))
            for name, term in task(passes, batch).items()
        }

    def _mixed(self, batch: Batch) -> Batch:
        """The batch with utterances mixed where a view asks for it, in training."""
        mixing = [n for n, v in self.spec.views.items() if v.mix is not None and self.training]
        views = {name: mix_view(batch.views[name], self.spec.views[name]) for name in mixing}
        batch = replace(batch, views={**batch.views, **views}) if views else batch
        return self._altered(batch) if self.training else batch

    @torch.no_grad()
    def _altered(self, batch: Batch) -> Batch:
        """The batch with the mel spectrograms of views whose augmentations change them."""
        views = {}
        for name, spec in self.spec.views.items():
            augments, view = mel.chosen(spec.augment), batch.views[name]
            if not augments:
                continue
            signal: Spectrum = self.towers[spec.tower_name].signal  # type: ignore[assignment]
            x = signal.linear(signal(view.data, view.lengths_P))
            # ranks may hold items of other lengths
            whole = signal.grid((round(spec.crop_s * spec.hz),))
            rows_BTF = x.new_zeros(batch.size, *whole)
            rows_BTF[view.rows_P, : x.shape[2]] = x[:, 0]
            rows_GTF = dist.gather_no_grad(rows_BTF)
            index_B, found_B = mixed_in(batch, name)
            other_BTF = (rows_GTF[index_B] * found_B[:, None, None])[:, : x.shape[2]]
            steps_P = signal.out_lengths(view.lengths_P)
            items = mel.Items(view.seeds_P, steps_P, other_BTF[view.rows_P][:, None])
            x = mel.apply(x, items, augments)
            views[name] = replace(view, signal=signal.logarithmic(x))
        return replace(batch, views={**batch.views, **views}) if views else batch

    def _augmented(self, batch: Batch, position: float) -> Batch:
        """The batch with the spectrograms of augmented towers, in training."""
        views = dict(batch.views)
        for name, augment in self.augments.items() if self.training else ():
            own = {view: batch.views[view] for view, t in self.tower_of.items() if t == name}
            views |= augment(own, self.towers[name].signal, batch.source_B, position)
        return replace(batch, views=views)

    def passes(self, batch: Batch, position: float = 1.0) -> Passes:
        """Encodings of one batch, each made when first asked for."""
        chunk = self.spec.train.chunk
        return Passes(self.towers, self.joints, self.tower_of, batch, position, chunk)  # type: ignore[arg-type]

    def _remember(self, passes: Passes) -> None:
        self.last_tokens = passes.token_count()
        self.last_embeddings = {
            f"{name}.{key}": z
            for name, task in self.tasks.items()
            for key, z in task.last.items()  # type: ignore[union-attr, operator]
        }

    @property
    def floors(self) -> dict[str, Floor]:
        """Terms that tell a collapse by the name they are reported under."""
        return {
            _join(name, term): floor
            for name, task in self.tasks.items()
            for term, floor in task.floors.items()  # type: ignore[union-attr, operator]
        }

    def after_step(self, step: int, total: int) -> None:
        """Let tasks and augmentations update their own buffers after an optimiser step."""
        for task in self.tasks.values():
            task.after_step(step / max(1, total))  # type: ignore[operator]
        for augment in self.augments.values():
            augment.write()  # type: ignore[operator]

    def set_policy(self, policy: Mapping[str, tuple[float, bool]]) -> None:
        """{parameter: (learning-rate factor, frozen)}; freezes what is to be frozen."""
        self._policy = dict(policy)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not self._policy.get(name, (1.0, False))[1])

    def parameter_policy(self) -> dict[str, ParamPolicy]:
        """Learning-rate factor, weight decay and freezing of every parameter by name.

        Vectors and scalars, positions, extra tokens, prototypes and gains of norms have no weight
        decay.
        """
        out: dict[str, ParamPolicy] = {}
        steady, gains = self._of_modules("constant_lr"), self._of_modules("no_decay")
        for name, parameter in self.named_parameters():
            scale, frozen = self._policy.get(name, (1.0, False))
            parts = name.split(".")
            own = parts[2:] if parts[0] == "tasks" else parts[1:]  # without the names users give
            decay = parameter.ndim > 1 and not _TABLES & set(own) and id(parameter) not in gains
            out[name] = ParamPolicy(scale, decay, frozen, id(parameter) in steady)
        return out

    def _of_modules(self, mark: str) -> set[int]:
        """Identities of the parameters of modules that have a mark."""
        marked = (module for module in self.modules() if getattr(module, mark, False))
        return {id(parameter) for module in marked for parameter in module.parameters()}

    # ------------------------------------------------------------ evaluation

    @torch.no_grad()
    def embed(self, batch: Batch) -> dict[Space, tuple[Tensor, Tensor]]:
        """{(modality, space): (unit vectors (B, D), present (B,))} of every view and space."""
        return {
            key: (F.normalize(z_BD, dim=-1), there)
            for key, (z_BD, there) in self.vectors(batch).items()
        }

    @torch.no_grad()
    def vectors(self, batch: Batch) -> dict[Space, tuple[Tensor, Tensor]]:
        """As `embed`, of any length, of the views that the batch has."""
        out: dict[Space, tuple[Tensor, Tensor]] = {}
        with evaluating(self):
            passes = self.passes(batch)
            for task in self._tasks():
                for (view, space), (z_BLD, filled) in task.vectors(passes).items():
                    key = (self.spec.views[view].modality, space)
                    out.setdefault(key, (z_BLD[:, 0], filled[:, 0]))
        return out

    def spaces(self) -> dict[Space, str]:
        """{(modality, space): the view whose vectors `embed` gives for it}."""
        out: dict[Space, str] = {}
        with evaluating(self):  # some spaces are reached in evaluation only
            for view, space in (key for task in self._tasks() for key in task.space_keys()):
                out.setdefault((self.spec.views[view].modality, space), view)
        return out

    def space_for(self, a: str, b: str) -> str | None:
        """The space in which two modalities are compared: a trained pair's, else any common one."""
        modality = {view: spec.modality for view, spec in self.spec.views.items()}
        for task in self._tasks():
            for between, space in task.vector_pairs():
                if {modality[v] for v in between} == {a, b}:
                    return space
        spaces = [{s for known, s in self.spaces() if known == m} for m in (a, b)]
        common = sorted(spaces[0] & spaces[1])
        return common[0] if common else None

    @torch.no_grad()
    def dense(self, batch: Batch) -> Dense | None:
        """Features of the first map score, for localization; None without one."""
        found = self._sound_map()
        if found is None:
            return None
        with evaluating(self):
            return found[0].features(self.passes(batch), *found[1])

    @torch.no_grad()
    def score_maps(self, video_PTSD: Tensor, audio_PUD: Tensor, valid_PU: Tensor) -> Tensor:
        """(P, T, S) similarity maps of paired rows of `dense` features."""
        found = self._sound_map()
        if found is None:
            raise ValueError("score_maps: the method has no map score")
        maps: Tensor = found[0].score.maps(video_PTSD, audio_PUD, valid_PU)
        return maps

    def map_pairs(self) -> list[Space]:
        """(video, other) modalities that a map score compares and no vector space relates."""
        return list(self._map_pairs())

    def _map_pairs(self) -> dict[Space, tuple[MapScore, tuple[str, str]]]:
        found: dict[Space, tuple[MapScore, tuple[str, str]]] = {}
        for task in self.tasks.values():
            for score, views in task.maps():  # type: ignore[operator]
                video, other = (self.spec.views[view].modality for view in views)
                if self.space_for(video, other) is None:
                    found.setdefault((video, other), (score, views))
        return found

    @torch.no_grad()
    def map_sides(self, batch: Batch) -> dict[Space, tuple[Parts, Parts, Tensor]]:
        """What the score of each of `map_pairs` reads, and the rows (B,) that have both sides.

        A side is its values, cells (B, T, S, D) or steps (B, U, D), and which of them are valid.
        """
        out: dict[Space, tuple[Parts, Parts, Tensor]] = {}
        with evaluating(self):
            passes = self.passes(batch)
            for pair, (score, views) in self._map_pairs().items():
                (video, seen), (other, heard) = (score.embed(passes, view) for view in views)
                out[pair] = video, other, seen[:, 0] & heard[:, 0]
        return out

    @torch.no_grad()
    def map_table(self, pair: Space, video: Parts, other: Parts) -> Tensor:
        """(A, C) scores of A videos with C sounds or texts: rows of sides of `map_sides`."""
        table: Tensor = self._map_pairs()[pair][0](video, other)
        return table[..., 0]

    def _sound_map(self) -> tuple[MapScore, tuple[str, str]] | None:
        found = (task.sound_map() for task in self.tasks.values())  # type: ignore[operator]
        return next((one for one in found if one is not None), None)

    @torch.no_grad()
    def match_logit(self, batch: Batch, partner_B: Tensor) -> Tensor | None:
        """(B,) logit of row i's first view with row partner[i]'s second; None without a match."""
        with evaluating(self):
            for task in self.tasks.values():
                if isinstance(task, Match):
                    return task.logits(self.passes(batch), batch, partner_B)
        return None

    @torch.no_grad()
    def masked_stats(self, batch: Batch) -> dict[str, Stats]:
        """Sums over the hidden places of each masked task."""
        with evaluating(self):
            passes = self.passes(batch)
            return {
                name: task.stats(passes, batch)
                for name, task in self.tasks.items()
                if isinstance(task, Masked)
            }

    def _tasks(self) -> list[Task]:
        return list(self.tasks.values())  # type: ignore[arg-type]


def need_tasks(spec: RunSpec) -> None:
    """Refuse to train a run without tasks, e.g. an imported encoder.

    Raises:
        UserError: there are none.
    """
    if not spec.tasks:
        raise UserError(
            f"{spec.name}: has no tasks and cannot be trained; name it in another run's "
            "towers.NAME.init"
        )


def _join(task: str, term: str) -> str:
    return f"{task}.{term}" if term else task
