"""The search that additive quantization is: entries of codebooks, the codebooks and the scales of rows, each in turn chosen so
that the error of a layer's outputs is least."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.stats import energy
from compress.weights import Codebook


class Search:
    """A matrix (out, in) float32 on its way into codebooks. found: what it is by now. hessian: (in, in)."""

    def __init__(self, values: Tensor, hessian: Tensor, found: Codebook, beam: int):
        self.values, self.hessian, self.found, self.beam = values, hessian, found, beam

    def error(self) -> float:
        """tr((Q - W) H (Q - W)^T)."""
        return float(energy(self.found.dense() - self.values, self.hessian))

    def improve_indices(self, seed: int) -> None:
        """Choose the entries of one vector after the other, in random order, for all rows at once; no row gets worse."""
        found, length = self.found, self.found.length
        n_vectors = found.indices.shape[2]
        slope = (found.dense() - self.values) @ self.hessian  # half the gradient of every row's error
        for j in torch.randperm(n_vectors, generator=torch.Generator().manual_seed(seed)).tolist():
            part = slice(j * length, (j + 1) * length)
            corner = self.hessian[part, part]
            old = sum(
                (book[found.indices[m, :, j].long()] for m, book in enumerate(found.books)), start=found.books.new_zeros(())
            )
            # s^2 e^T H e + 2 s e^T (slope - s H old), of which e is to make the least
            linear = 2 * (slope[:, part] / found.scale - old @ corner)
            indices, total = self._beam_search(linear, corner)
            better = _quadratic(total, corner, linear) < _quadratic(old, corner, linear)
            found.indices[:, better, j] = indices[:, better]
            change = torch.where(better.unsqueeze(1), total - old, 0) * found.scale
            slope.addmm_(change, self.hessian[part])

    def _beam_search(self, linear: Tensor, corner: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (n_books, out) and sums (out, length) of entries e for which e^T corner e + linear e is small."""
        n_rows, length = linear.shape
        sums, taken = linear.new_zeros(n_rows, 1, length), torch.zeros(0, n_rows, 1, dtype=torch.int32, device=linear.device)
        reached = linear.new_zeros(n_rows, 1)
        for book in self.found.books:
            own = ((book @ corner) * book).sum(1)
            cost = reached.unsqueeze(2) + own + (linear.unsqueeze(1) + 2 * sums @ corner) @ book.T  # (rows, beam, entries)
            reached, best = cost.flatten(1).topk(min(self.beam, cost[0].numel()), largest=False)
            parent, entry = best // len(book), best % len(book)
            sums = sums.gather(1, parent.unsqueeze(2).expand(-1, -1, length)) + book[entry]
            kept = taken.gather(2, parent.expand(len(taken), -1, -1)) if len(taken) else taken.expand(0, n_rows, best.shape[1])
            taken = torch.cat([kept, entry.to(torch.int32).unsqueeze(0)])
        return taken[:, :, 0], sums[:, 0]  # topk sorts: the first is the best

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
        vectors = (slope * found.scale).view(-1, found.length)
        sums = torch.zeros_like(found.books)
        for total, chosen in zip(sums, found.indices, strict=True):
            total.index_add_(0, chosen.flatten().long(), vectors)
        return sums

    def solve_scales(self) -> None:
        """The scale of every row that makes its error least."""
        unscaled = self.found.dense() / self.found.scale
        product = unscaled @ self.hessian
        below = (product * unscaled).sum(1, keepdim=True)
        scale = (product * self.values).sum(1, keepdim=True) / below
        self.found = self._with(scale=torch.where((below > 0) & (scale > 0), scale, self.found.scale))

    def _with(self, **changed: Tensor) -> Codebook:
        found = self.found.rebuild(self.found.parameters() | changed)
        assert isinstance(found, Codebook)
        return found


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
