"""The search: try the candidates one at a time, keep what makes the score better, put back the rest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from splaser_plugin.errors import MatrixError
from splaser_plugin.matrices import Matrix
from splaser_plugin.progress import SILENT, Progress
from splaser_plugin.scan import MatrixScan, Scan
from splaser_plugin.scoring import Scorer, Scores
from splaser_plugin.weights import Weights


@dataclass(frozen=True)
class Candidate:
    """A matrix to try, and the rank to reduce it to."""

    matrix: Matrix
    rank: int
    edge: str
    threshold: float
    snr: float | None


@dataclass(frozen=True)
class Trial:
    """One candidate tried."""

    candidate: Candidate
    scores: Scores
    kept: bool
    best_before: float
    """Mean score that had to be beaten."""
    elapsed_s: float


@dataclass(frozen=True)
class SearchResult:
    baseline: Scores
    """The model as it came."""
    final: Scores
    """The model with everything that was kept."""
    trials: tuple[Trial, ...]

    @property
    def kept(self) -> tuple[Candidate, ...]:
        return tuple(trial.candidate for trial in self.trials if trial.kept)


def choose_candidates(scan: Scan, matrices: Sequence[Matrix], count: int) -> list[Candidate]:
    """The `count` matrices of lowest snr, lowest first, each with its edge's rank.

    Matrices in which the edge leaves nothing to remove are passed over; where it leaves nothing to keep,
    the largest component stays. Raises MatrixError when no candidate is left.
    """
    by_name = {matrix.name: matrix for matrix in matrices}
    candidates = [_candidate(found, by_name[found.name], scan.edge) for found in scan.ranked("snr")]
    reducible = [candidate for candidate in candidates if candidate.rank < min(candidate.matrix.shape)]
    if not reducible:
        raise MatrixError(
            f"edge '{scan.edge}' calls every singular value of all {len(candidates)} matrices signal: nothing to "
            "reduce. Try another --edge."
        )
    return reducible[:count]


def _candidate(found: MatrixScan, matrix: Matrix, edge: str) -> Candidate:
    fit = found.edges[edge]
    return Candidate(matrix, max(1, fit.rank), edge, fit.threshold, fit.snr)


def search(
    weights: Weights, candidates: Sequence[Candidate], scorer: Scorer, *, progress: Progress = SILENT
) -> SearchResult:
    """Try each candidate on top of what was kept so far; keep it if the mean score is strictly better.

    Source of the rule: the published laser scripts. An exception or Ctrl-C leaves kept changes in place and
    the undecided matrix bit for bit as it was.
    """
    with progress.phase("baseline", 1) as advance:
        baseline = best = scorer.score()
        advance(1)
    progress.fact("baseline score", f"{baseline.mean:+.4f}")
    trials: list[Trial] = []
    with progress.phase("search", len(candidates)) as advance:
        for candidate in candidates:
            started = time.monotonic()
            with weights.trying(candidate.matrix) as attempt:
                attempt.reduce(candidate.rank)
                scores = scorer.score()
                kept = accepts(scores, best)
                if kept:
                    attempt.keep()
            trials.append(Trial(candidate, scores, kept, best.mean, time.monotonic() - started))
            best = scores if kept else best
            progress.trial(trials[-1])
            advance(1)
    return SearchResult(baseline, best, tuple(trials))


def accepts(scores: Scores, best: Scores) -> bool:
    """The published rule: any strict improvement of the mean over the same pairs."""
    return scores.mean > best.mean
