"""The best run that a budget buys, by the papers' accuracy tables. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass

from clipa_fast.errors import UserError
from clipa_fast.planning.accuracy import Candidate, candidates
from clipa_fast.planning.step_time import Throughput


@dataclass(frozen=True)
class Offer:
    """A run with its estimated price."""

    run: Candidate
    hours: float
    dollars: float


@dataclass(frozen=True)
class Offers:
    """What a budget buys.

    Attributes:
      affordable: best accuracy first, of each model and data set only runs that are better than all cheaper ones.
      cheapest_beyond: the cheapest run above the budget that is better than all affordable ones; None: none is known.
    """

    affordable: tuple[Offer, ...]
    cheapest_beyond: Offer | None


def spend(budget: float, price: float, throughput: Throughput, *, model: str | None, data: str | None) -> Offers:
    """Runs under a budget.

    Args:
      budget: dollars.
      price: dollars of a device-hour.
      throughput: the device's speed.
      model: only this preset.
      data: only this data set.

    Raises:
      UserError: the budget is below the cheapest run that the tables know, or they know none of that model and data.
    """
    if not budget > 0:
        raise UserError(f"budget: got {budget:g}; accepted: dollars above 0")
    known = [
        run for run in candidates() if model in (None, run.model.preset) and (data is None or run.data == data.lower())
    ]
    if not known:
        have = sorted({f"{run.model.preset} on {run.data}" for run in candidates()})
        raise UserError(
            f"budget: no published accuracy of {model or 'any model'} on {data or 'any data'};"
            f" there are: {', '.join(have)}"
        )
    offers = [Offer(run, hours, hours * price) for run in known for hours in [throughput.hours(run.model, run.stages)]]
    offers.sort(key=lambda offer: (offer.dollars, -offer.run.accuracy.estimate))
    if offers[0].dollars > budget:
        raise UserError(
            f"budget: ${budget:,.0f} is less than the cheapest run that the papers tell an accuracy of,"
            f" ${offers[0].dollars:,.0f} ({offers[0].run.model.preset}); below it nothing is extrapolated"
        )
    affordable = [offer for offer in offers if offer.dollars <= budget]
    best: dict[tuple[str, str], float] = {}
    front = []
    for offer in affordable:
        key = offer.run.model.preset, offer.run.data
        if offer.run.accuracy.estimate > best.get(key, 0.0):
            best[key] = offer.run.accuracy.estimate
            front.append(offer)
    front.sort(key=lambda offer: -offer.run.accuracy.estimate)
    top = front[0].run.accuracy.estimate
    beyond = [o for o in offers if o.dollars > budget and o.run.accuracy.published and o.run.accuracy.estimate > top]
    return Offers(tuple(front), beyond[0] if beyond else None)
