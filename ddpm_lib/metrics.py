"""Figures that say how far samples are from data, from features of both; what gives the features is the caller's."""

import math

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features, (N, D) and (M, D).

    ``|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, in float64. With features of the Inception network
    this is the FID, with ``Classifier.spatial_features`` an analogue of the sFID. Both sets need at least two rows;
    below D rows the covariances are singular and the figure says little.

    Source: Dowson and Landau (1982); Heusel et al. (2017).
    """
    a, b = _two_sets(a, b, 2)
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    root_a = _root(cov_a)
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance)


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of generated features (M, D) against real ones (N, D), both in [0, 1].

    Each set stands for a region: the balls around its points that reach to their k-th nearest neighbour. Precision is
    the share of generated points in the real region, recall the share of real points in the generated region. Memory
    grows with N^2, M^2 and N M.

    Source: Kynkäänniemi et al. (2019).
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a whole number, 1 or more; got {k!r}.")
    real, generated = _two_sets(real, generated, k + 1)
    return _share_within(generated, real, k), _share_within(real, generated, k)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy of two sets of features, (N, D) and (M, D), without bias.

    With the kernel ``(x . y / D + 1)^3`` of the KID. It can fall below 0 for sets that are alike.

    Source: Gretton et al. (2012), equation 3; Bińkowski et al. (2018).
    """
    a, b = _two_sets(a, b, 2)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def among(x: Tensor) -> Tensor:
        """Mean over pairs of different points."""
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return float(among(a) + among(b) - 2 * kernel(a, b).mean())


def inception_score(logits: Tensor) -> float:
    """exp of the mean Kullback-Leibler divergence from p(class) to p(class | image), between 1 and C.

    Args:
        logits: of a classifier, (N, C). With the Inception network's it is the Inception score (of all images at once;
            the published ones are means over ten parts, a little lower); with another's, its analogue.

    Source: Salimans et al. (2016).
    """
    if logits.ndim != 2 or len(logits) < 1 or not logits.isfinite().all():
        raise ValueError(f"logits must be finite, of shape (N, C); got shape {tuple(logits.shape)}.")
    log_p = logits.double().log_softmax(1)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))
    return float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256, seed: int = 0) -> float:
    """Mean over random directions of the Wasserstein-1 distance of two equally large sets, (N, D), seen along each.

    Source: Bonneel et al. (2015).
    """
    a, b = _two_sets(a, b, 1)
    if len(a) != len(b):
        raise ValueError(f"both sets must hold equally many points; got {len(a)} and {len(b)}.")
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(a.shape[1], directions, generator=generator, dtype=a.dtype)
    axes = (axes / axes.norm(dim=0)).to(a.device)
    return float(((a @ axes).sort(0).values - (b @ axes).sort(0).values).abs().mean())


def _two_sets(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise ValueError(
            f"features must have shapes (N, D) and (M, D) with N, M >= {least}; "
            f"got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features must be finite; got nan or inf.")
    return a, b


def _root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _share_within(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of points in at least one ball around a centre that reaches to its k-th nearest neighbour."""
    radius = _distances(centres, centres).kthvalue(k + 1).values  # the nearest is the centre itself
    return float((_distances(points, centres) <= radius).any(1).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
