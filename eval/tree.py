"""The survey's tree of methods, with those of a report in their places and the best that each of them reached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from compress.eval.metrics import Metrics, Report
from compress.eval.taxonomy import OTHER, style_of
from compress.passes import Taxon


@dataclass(frozen=True)
class Method:
    """key: as on the command line. idea: one line. paper: arXiv number or citation. best: of the points that used the
    method, the one that keeps most, the smaller of equals; None where the report has none. n_points: that used it."""

    key: str
    idea: str = ""
    paper: str = ""
    best: Metrics | None = None
    n_points: int = 0


@dataclass
class Branch:
    """name: of this step of the path. style: how a leaf is drawn, "" for what only holds others."""

    name: str
    style: str = ""
    branches: list[Branch] = field(default_factory=list)
    methods: list[Method] = field(default_factory=list)

    @property
    def used(self) -> list[Method]:
        return [method for method in self.methods if method.best is not None]

    @property
    def unused(self) -> list[Method]:
        return [method for method in self.methods if method.best is None]


def method_tree(report: Report) -> Branch:
    """Every leaf of the survey's branch "Model Compression", and leaves of third parties that the report names."""
    root = Branch("Model compression")
    leaves = {taxon.value: _grow(root, taxon.value) for taxon in Taxon}
    users: dict[str, list[Metrics]] = {}
    placed = dict(_installed())
    for point in report.points:
        for number, step in enumerate(point.passes):
            key = step.partition(":")[0]
            users.setdefault(key, []).append(point)
            taxon = (point.taxon if number == len(point.passes) - 1 else None) or OTHER.name
            placed.setdefault(key, (taxon, Method(key)))
    for key, (taxon, method) in placed.items():
        if taxon not in leaves:
            leaves[taxon] = _grow(root, taxon)
        points = list({id(point): point for point in users.get(key, ())}.values())
        best = min(points, key=_rank, default=None)
        leaves[taxon].methods.append(Method(key, method.idea, method.paper, best, len(points)))
    return root


def _installed() -> Iterator[tuple[str, tuple[str, Method]]]:
    from compress import methods  # imports every method: only a page needs them

    for key, method in methods.available().items():
        yield key, (method.taxon.value, Method(key, methods.idea(method), method.paper))


def _rank(point: Metrics) -> tuple[float, float, int]:
    kept = -1.0 if point.mean_recovery is None else round(point.mean_recovery, 3)
    return -kept, point.fidelity.kl_mean if point.fidelity and kept < 0 else 0.0, point.cost.bytes_on_disk


def _grow(root: Branch, path: str) -> Branch:
    branch = root
    for name in path.split(" / "):
        found = next((one for one in branch.branches if one.name == name), None)
        if found is None:
            found = Branch(name)
            branch.branches.append(found)
        branch = found
    branch.style = style_of(path).key
    return branch
