"""The search that additive quantization is: entries of codebooks, the codebooks and the scales of rows, each in turn chosen so
that the error of a layer's outputs is least."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.stats import energy
from compress.weights import Codebook

_ELEMENTS = 1 << 24  # of a table of costs that is held at a time


class Search:
    """A matrix (out, in) float32 on its way into codebooks. found: what it is by now. hessian: (in, in)."""

    def __init__(self, values: Tensor, hessian: Tensor, found: Codebook, beam: int):
        self.values, self.hessian, self.found, self.beam = values, hessian, found, beam

    def error(self) -> float:
        """tr((Q - W) H (Q - W)^T)."""
        return float(energy(self.found.dense() - self.values, self.hessian))

    def refine(self, rounds: int, tolerance: float) -> None:
        """Turns of all of these, at most so many: until the error falls by less than that share of it."""
        error = self.error()
        for number in range(rounds):
            self.improve_indices(number)
            self.solve_books()
            self.solve_scales()
            before, error = error, self.error()
            if before - error < tolerance * before:
                break

    def improve_indices(self, seed: int) -> None:
        """Choose anew the entries of the vectors that one input, or one run of inputs, has in all rows; then those of the next,
        in random order. No vector gets worse."""
        found, books = self.found, self.found.books
        width = found.length if found.axis else 1  # inputs that a vector spans
        scale = found.vector_scale
        slope = (found.dense() - self.values) @ self.hessian  # half the gradient of every row's error
        identity = torch.eye(found.length, device=books.device)
        for j in torch.randperm(found.indices.shape[2], generator=torch.Generator().manual_seed(seed)).tolist():
            part = slice(j * width, (j + 1) * width)
            own = self.hessian[part, part]
            corner = own if found.axis else own * identity
            old = sum((book[chosen[:, j].long()] for book, chosen in zip(books, found.indices, strict=True)), books.new_zeros(()))
            # s^2 e^T H e + 2 s e^T (slope - s H old), of which e is to make the least
            linear = 2 * (found.split(slope[:, part]).squeeze(1) / scale[:, j : j + 1] - old @ corner)
            indices, total = beam_search(books, linear, corner, self.beam)
            better = _quadratic(total, corner, linear) < _quadratic(old, corner, linear)
            found.indices[:, better, j] = indices[:, better]
            change = torch.where(better.unsqueeze(1), total - old, 0) * scale[:, j : j + 1]
            slope.addmm_(change if found.axis else change.view(-1, 1), self.hessian[part])

    def solve_books(self, steps: int = 20) -> None:
        """The entries that make the error least, by conjugate gradients from those that are there: the error is quadratic."""
        books = self.found.books
        residual = -self._pulled_back((self.found.dense() - self.values) @ self.hessian)
        direction, norm = residual.clone(), residual.square().sum()
        enough = 1e-8 * norm  # beyond which float32 has nothing left to find
        for _ in range(steps):
            moved = self.found.rebuild({"books": direction, "scale": self.found.scale}).dense()
            curvature = energy(moved, self.hessian)
            if not norm > enough or not curvature > 0:
                break
            step = norm / curvature
            books = books + step * direction
            residual = residual - step * self._pulled_back(moved @ self.hessian)
            before, norm = norm, residual.square().sum()
            direction = residual + norm / before * direction
        self.found = self._with(books=books)

    def _pulled_back(self, slope: Tensor) -> Tensor:
        """The gradient with regard to the books, of one (out, in) with regard to the matrix."""
        found = self.found
        vectors = found.split(slope * found.scale).flatten(0, 1)
        sums = torch.zeros_like(found.books)
        for total, chosen in zip(sums, found.indices, strict=True):
            total.index_add_(0, chosen.flatten().long(), vectors)
        return sums

    def solve_scales(self) -> None:
        """The scales that make the error least: one of a row is a quotient, those of inputs depend on each other."""
        unscaled = self.found.rebuild({"books": self.found.books, "scale": torch.ones_like(self.found.scale)}).dense()
        if self.found.axis:
            product = unscaled @ self.hessian
            below = (product * unscaled).sum(1, keepdim=True)
            scale = (product * self.values).sum(1, keepdim=True) / below
            scale = torch.where((below > 0) & (scale > 0), scale, self.found.scale)
        else:
            system = (self.hessian * (unscaled.T @ unscaled)).double()
            wanted = (unscaled * (self.values @ self.hessian)).sum(0).double()
            system.diagonal().add_(1e-6 * system.diagonal().mean())
            change = torch.linalg.solve(system, wanted - system @ self.found.scale.flatten().double())
            scale = self.found.scale + change.to(unscaled)
        self.found = self._with(scale=scale)

    def _with(self, **changed: Tensor) -> Codebook:
        found = self.found.rebuild(self.found.parameters() | changed)
        assert isinstance(found, Codebook)
        return found


def beam_search(books: Tensor, linear: Tensor, corner: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """Indices (n_books, n) int32 and sums (n, length) of entries e, one of every book, for which e^T corner e + linear e is
    small, for each of n linear terms (n, length); float32. ``beam`` sums are followed up from book to book."""
    found = [_beam_search(books, part, corner, beam) for part in linear.split(max(1, _ELEMENTS // (beam * books.shape[1])))]
    return torch.cat([indices for indices, _ in found], 1), torch.cat([sums for _, sums in found])


def _beam_search(books: Tensor, linear: Tensor, corner: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    n, length = linear.shape
    sums, taken = linear.new_zeros(n, 1, length), torch.zeros(0, n, 1, dtype=torch.int32, device=linear.device)
    reached = linear.new_zeros(n, 1)
    for book in books:
        own = ((book @ corner) * book).sum(1)
        cost = reached.unsqueeze(2) + own + (linear.unsqueeze(1) + 2 * sums @ corner) @ book.T  # (n, beam, entries)
        reached, best = cost.flatten(1).topk(min(beam, cost.shape[1] * cost.shape[2]), largest=False)
        parent, entry = best // len(book), best % len(book)
        sums = sums.gather(1, parent.unsqueeze(2).expand(-1, -1, length)) + book[entry]
        kept = taken.gather(2, parent.expand(len(taken), -1, -1)) if len(taken) else taken.expand(0, n, best.shape[1])
        taken = torch.cat([kept, entry.to(torch.int32).unsqueeze(0)])
    return taken[:, :, 0], sums[:, 0]  # topk sorts: the first is the best


def _quadratic(entries: Tensor, corner: Tensor, linear: Tensor) -> Tensor:
    """e^T corner e + linear e for each row e of entries (rows, length)."""
    return ((entries @ corner + linear) * entries).sum(1)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H with a share of its mean diagonal added to the diagonal; the identity where no token came by."""
    mean = hessian.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(hessian), device=hessian.device)
    result = hessian / mean
    result.diagonal().add_(damping)
    return result
