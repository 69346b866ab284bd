"""Preferences: losses over pairs of completions, from the log-probabilities of both sides.

In the formulas, s is log p - log p_ref of a side, d = s(chosen) - s(rejected), and lp is the mean
log-probability of a side's tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.params import Leaf
from jaxft.core.step import BATCH_MEANS, Batch, Metrics
from jaxft.kernels.cross_entropy import linear_log_probs
from jaxft.objectives.classification import head_flops, head_scores
from jaxft.objectives.next_token import NextToken

REWARD = "reward"  # scores of a head in place of log-probabilities
MEAN_SCORED = ("orpo", "simpo")  # rewards are means over tokens, without a reference
KTO = "kto"  # the loss of single answers, which needs means over the whole batch
ROUNDING = 1e-6  # relative error of a sum of log-probabilities, below which two rewards are equal
Values = Float[Array, "B K"]


class PreferenceRule(NamedTuple):
    """The name of a preference loss and its numbers.

    beta: scale of the rewards, for ORPO the weight of the odds term. margin: SimPO's gamma / beta.
    smoothing: share of swapped labels. sft: weight of the chosen side's loss beside the DPO family.
    center: weight of the squared sum of both rewards of a reward model. desirable, undesirable:
    weights of KTO's good and bad answers.
    """

    name: str
    beta: float
    margin: float = 0.0
    smoothing: float = 0.0
    sft: float = 0.0
    center: float = 0.0
    desirable: float = 1.0
    undesirable: float = 1.0


class PairScores(NamedTuple):
    """Log-probabilities of pairs, chosen first: sums over a side's tokens, the policy's and step 0.

    tokens: trained tokens of a side, at least 1. reference is zero for losses without one. `policy`
    of a reward model are its scores.
    KTO: the record's own completion comes first, then one of another prompt.
    """

    policy: Float[Array, "B K 2"]
    reference: Float[Array, "B K 2"]
    tokens: Float[Array, "B K 2"]


def dpo(d: Values, beta: float, smoothing: float = 0.0) -> Values:
    """Return the DPO loss, ln 2 at step 0. Smoothing e mixes in the swapped pair.

    Sources: Rafailov et al. 2023, arXiv:2305.18290, eq. 7. Mitchell 2023, "A note on DPO with noisy
    preferences" (cDPO), eq. 3.
    """
    straight, swapped = -jax.nn.log_sigmoid(beta * d), -jax.nn.log_sigmoid(-beta * d)
    return (1 - smoothing) * straight + smoothing * swapped if smoothing else straight


def robust(d: Values, beta: float, smoothing: float) -> Values:
    """Return the DPO loss whose mean is unbiased if a share e of the labels is swapped.

    Source: Chowdhury et al. 2024, arXiv:2403.00409, eq. 12.
    """
    straight, swapped = -jax.nn.log_sigmoid(beta * d), -jax.nn.log_sigmoid(-beta * d)
    return ((1 - smoothing) * straight - smoothing * swapped) / (1 - 2 * smoothing)


def hinge(d: Values, beta: float) -> Values:
    """Return relu(1 - beta d), 1 at step 0. Source: Zhao et al. 2023 (SLiC), arXiv:2305.10425."""
    return jax.nn.relu(1 - beta * d)


def ipo(mean_d: Values, beta: float) -> Values:
    """Return (d - 1 / (2 beta))^2 of s per token, 1 / (4 beta^2) at step 0.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17. The authors confirmed the division by the
    tokens of each side (a note in TRL).
    """
    return jnp.square(mean_d - 1 / (2 * beta))


def apo_zero(chosen: Values, rejected: Values, beta: float) -> Values:
    """Return the APO-zero loss of s of both sides: it raises one and lowers the other.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7.
    """
    return 1 - jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * rejected)


def orpo(chosen: Values, rejected: Values, weight: float) -> Values:
    """Return the loss of the chosen answer, and `weight` times that of the odds ratio of both lp.

    Source: Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7. TRL's first term also has the prompt.
    """
    odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -chosen - weight * jax.nn.log_sigmoid(odds)


def log1mexp(x: Values) -> Values:
    """Return log(1 - exp(x)) for x < 0. Values above -1e-6 count as -1e-6, so that it is finite.

    Source: Maechler 2012, "Accurately computing log(1 - exp(-|a|))", eq. 7.
    """
    x = jnp.minimum(x, -1e-6)
    near = x > -np.log(2.0)
    # Each branch gets a safe value where it is not taken: its gradient would be 0 * inf.
    small, large = jnp.where(near, x, -0.5), jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


def simpo(chosen: Values, rejected: Values, beta: float, margin: float) -> Values:
    """Return -log sigmoid(beta (lp(chosen) - lp(rejected) - margin)), with margin = gamma / beta.

    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    return -jax.nn.log_sigmoid(beta * (chosen - rejected - margin))


def kto(
    s: Values, desirable: Bool[Array, "B K"], baseline: Float[Array, ""], beta: float
) -> Values:
    """Return 1 - sigmoid(beta (s - z)) of a desirable answer, 1 - sigmoid(beta (z - s)) of another.

    baseline: z, an estimate of the divergence from the reference, without a gradient.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.
    """
    gain = jnp.where(desirable, s - baseline, baseline - s)
    return 1 - jax.nn.sigmoid(beta * gain)


def reward(chosen: Values, rejected: Values, center: float) -> Values:
    """Return -log sigmoid(chosen - rejected) of two rewards, ln 2 if they are equal.

    center: weight of (chosen + rejected)^2, which keeps the mean of the rewards near 0.
    Sources: Ouyang et al. 2022, arXiv:2203.02155, eq. 1. Eisenstein et al. 2023, arXiv:2312.09244,
    eq. 2.
    """
    loss = -jax.nn.log_sigmoid(chosen - rejected)
    return loss + center * jnp.square(chosen + rejected) if center else loss


def preference_loss(
    rule: PreferenceRule,
    scores: PairScores,
    weights: Values,
    desirable: Bool[Array, "B K"] | None = None,
    whole: Float[Array, " 2"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the loss summed over pairs, and sums of metrics with the names that TRL gives them.

    weights: 1 for a pair, 0 for padding. desirable: labels of KTO's completions. whole: the means
    of `kto_sums` over the whole batch, if this is a part of it. Padding gets log-probabilities of
    -1, so that no formula has an infinite gradient there.
    """
    real = (weights > 0)[..., None]
    policy = jnp.where(real, scores.policy, -1.0)
    s = policy - jnp.where(real, scores.reference, -1.0)
    if rule.name == KTO:
        assert desirable is not None
        if whole is None:
            whole = kto_sums(s, weights, desirable) / jnp.maximum(jnp.sum(weights), 1.0)
        return _kto_loss(rule, s, policy, weights, desirable, whole)
    mean, mean_s = policy / scores.tokens, s / scores.tokens  # [B, K, 2]
    losses = _pair_losses(rule, s, mean, mean_s)
    if rule.sft:  # Pang et al. 2024, arXiv:2404.19733: the mean over the tokens of the answer
        losses = losses - rule.sft * mean[..., 0]
    shown = mean if rule.name in MEAN_SCORED else policy
    gains = mean if rule.name in MEAN_SCORED else s
    rounding = ROUNDING * jnp.abs(policy).sum(-1)
    metrics = {
        "rewards/chosen": rule.beta * gains[..., 0],
        "rewards/rejected": rule.beta * gains[..., 1],
        "rewards/accuracies": gains[..., 0] - gains[..., 1] > rounding,  # a tie is no success
        "rewards/margins": rule.beta * (gains[..., 0] - gains[..., 1]),
    }
    if rule.name != REWARD:
        metrics |= {"logps/chosen": shown[..., 0], "logps/rejected": shown[..., 1]}
    sums = {name: jax.lax.stop_gradient(jnp.sum(weights * x)) for name, x in metrics.items()}
    return jnp.sum(weights * losses), sums


def _pair_losses(rule: PreferenceRule, s: Array, mean: Array, mean_s: Array) -> Values:
    """Return the loss of each pair from s, lp and s per token, each [B, K, 2]."""
    d, mean_d, beta = s[..., 0] - s[..., 1], mean_s[..., 0] - mean_s[..., 1], rule.beta
    match rule.name:
        case "dpo":
            return dpo(d, beta, rule.smoothing)
        case "sigmoid_norm":
            return dpo(mean_d, beta, rule.smoothing)
        case "robust":
            return robust(d, beta, rule.smoothing)
        case "hinge":
            return hinge(d, beta)
        case "ipo":
            return ipo(mean_d, beta)
        case "apo_zero":
            return apo_zero(s[..., 0], s[..., 1], beta)
        case "orpo":
            return orpo(mean[..., 0], mean[..., 1], beta)
        case "simpo":
            return simpo(mean[..., 0], mean[..., 1], beta, rule.margin)
        case "reward":
            return reward(s[..., 0], s[..., 1], rule.center)
    raise ValueError(f"{rule.name!r} is no loss over pairs")


def kto_sums(
    s: Float[Array, "B K 2"], weights: Values, desirable: Bool[Array, "B K"]
) -> Float[Array, " 2"]:
    """Return the sums whose means over the batch KTO needs: s of other prompts, and good answers.

    They have no gradient.
    """
    sums = jnp.stack([jnp.sum(weights * s[..., 1]), jnp.sum(weights * desirable)])  # [2]
    return jax.lax.stop_gradient(sums)


def _kto_loss(
    rule: PreferenceRule,
    s: Array,
    policy: Array,
    weights: Values,
    desirable: Bool[Array, "B K"],
    whole: Float[Array, " 2"],
) -> tuple[Float[Array, ""], Metrics]:
    """Return KTO's summed loss, whose baseline is a mean over the whole batch, and its metrics.

    The step divides sums by the weight. A mean over the good answers is thus a sum over them,
    divided by their share.
    """
    drift, share = whole
    baseline = jnp.maximum(drift, 0.0)
    losses = kto(s[..., 0], desirable, baseline, rule.beta)
    losses = losses * jnp.where(desirable, rule.desirable, rule.undesirable)
    good, bad = weights * desirable, weights * ~desirable

    def mean(x: Array, of: Array, share: Array) -> Array:
        return jax.lax.stop_gradient(jnp.sum(of * x) / jnp.maximum(share, 1e-8))

    rewards, logps = rule.beta * s[..., 0], policy[..., 0]
    chosen, rejected = mean(rewards, good, share), mean(rewards, bad, 1 - share)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "logps/chosen": mean(logps, good, share),
        "logps/rejected": mean(logps, bad, 1 - share),
        "kl": jnp.sum(weights) * baseline,
    }
    return jnp.sum(weights * losses), metrics


def segment_sums(
    values: Float[Array, "B T"], segments: Int[Array, "B T"], count: int
) -> Float[Array, "B S"]:
    """Return the sums of a row's segments 1 to `count`. Segment 0 is padding."""
    own = segments[:, None] == jnp.arange(1, count + 1)[None, :, None]  # [B, S, T]
    return jnp.sum(jnp.where(own, values[:, None], 0.0), axis=-1)


@dataclass(frozen=True)
class Preference:
    """A preference loss of a decoder over rows of pairs. Segments 2k - 1 and 2k are pair k.

    tokens: the decoder's hidden states and trained positions of such rows.
    """

    tokens: NextToken
    rule: PreferenceRule
    remat: str = "none"
    unit: ClassVar[str] = "tokens"
    unread: tuple[str, ...] = ()

    def loss(
        self, model: Any, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """Return the loss summed over pairs, and their number.

        Adapters use no dropout: the stored reference has none.
        """
        policy, tokens = self.score(model, batch)
        reference = batch.get("reference", jnp.zeros_like(policy))
        scores = PairScores(policy, reference, tokens)
        weights, desirable = batch["pairs"], batch.get("desirable")
        whole = batch[BATCH_MEANS][0] if BATCH_MEANS in batch else None
        total, metrics = preference_loss(self.rule, scores, weights, desirable, whole)
        return (total, jnp.sum(weights)), metrics

    def measure(self, model: Any, batch: Batch) -> tuple[Float[Array, " 2"], Float[Array, ""]]:
        """Return `kto_sums` of a part of the batch, and its number of answers."""
        policy, _ = self.score(model, batch)
        weights = batch["pairs"]
        s = jnp.where((weights > 0)[..., None], policy - batch["reference"], 0.0)  # [B, K, 2]
        return kto_sums(s, weights, batch["desirable"]), jnp.sum(weights)

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        return self.tokens.units(batch)

    def flops(self, trained: Mapping[str, Leaf]) -> float:
        return head_flops(self.tokens, trained)

    def score(
        self, model: Any, batch: Batch
    ) -> tuple[Float[Array, "B K 2"], Float[Array, "B K 2"]]:
        """Return the log-probability of each side of each pair, and its tokens (at least 1).

        A reward model returns its scores, each of one token.
        """
        tokens, (rows, pairs) = replace(self.tokens, remat=self.remat), batch["pairs"].shape
        if self.rule.name == REWARD:
            scores, weights, segments = head_scores(tokens, model, batch)
            each = weights * scores[..., 0]
            sums = segment_sums(each, segments, 2 * pairs).reshape(rows, pairs, 2)  # [B, K, 2]
            return sums, jnp.ones_like(sums)
        hidden = tokens.hidden(model, batch, None)
        names = ("targets", "weights", "segment_ids")
        hidden, targets, weights, segments = tokens.trained_only(hidden, batch, tokens.width, names)
        head, vocab_first, soft_cap = model.head()
        features = model.features(hidden, None)
        each = linear_log_probs(features, head, targets, vocab_first=vocab_first, soft_cap=soft_cap)
        sums, counts = (
            segment_sums(x, segments, 2 * pairs).reshape(rows, pairs, 2)  # [B, K, 2]
            for x in (each * weights, weights)
        )
        return sums, jnp.maximum(counts, 1.0)
