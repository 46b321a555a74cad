"""The one loop that every fit runs."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from .._tree import Params, Where
from ._batch import Batch, RaggedBatch
from ._data import Source
from ._movers import Movers
from ._networks import Gradients, Networks, one_by_one
from ._objective import Objective
from ._options import Options


class Watcher(Protocol):
    """What looks at the networks while they are trained, to collect or to compare them.

    One that has ``is_done``, ``(K,)``, says which networks no longer matter: those may diverge.

    ``members()`` gives the present parameters, every leaf with a leading axis ``K``; they are to be read at
    once, for the next step writes into them.
    """

    def after_step(self, members: Callable[[], Params]) -> None:
        """See the networks after every step."""
        ...

    def after_epoch(self, members: Callable[[], Params]) -> bool:
        """See the networks after every epoch; training ends when it returns ``True``."""
        ...


def minimize(
    objective: Objective,
    members: Params,
    source: Source,
    seeds: Sequence[int],
    streams: Sequence[int],
    options: Options,
    *,
    where: Where | None = None,
    gradients: Gradients = one_by_one,
    make_movers: Callable[[Sequence[Tensor], Options], Movers] = Movers.separate,
    watcher: Watcher | None = None,
) -> Params:
    """Train ``K`` networks on an objective: the one loop that every fit runs.

    Args:
        objective: Loss of one network.
        members: Where they start; every leaf has a leading axis ``K``.
        source: The data.
        seeds: One a network, for its noise.
        streams: Seeds of the streams of batches: one a network, or one for all.
        options: How to descend.
        where: Which leaves to train.
        gradients: How gradients are found.
        make_movers: How optimizers are shared out.
        watcher: Sees the networks after every step and epoch.

    Returns:
        Trained members, all new tensors without a graph.
    """
    # Whatever the caller's mode: gradients are needed here, and tensors that autograd can save.
    with torch.inference_mode(False), torch.enable_grad():
        networks = Networks(objective, members, seeds, where, options.call, compile=options.compile)
        movers = make_movers(networks.leaves, options)

        def present() -> Params:
            return networks.present(movers.leaves())

        with _bar(options) as show:
            for epoch in range(options.num_epochs):
                batches = source.epoch(streams, epoch, networks.device)
                after_step = functools.partial(watcher.after_step, present) if watcher is not None else None
                matters = ~getattr(watcher, "is_done", torch.zeros(networks.num_members, dtype=torch.bool))
                table, weights = _run_epoch(batches, networks, movers, gradients, options, after_step)
                _check_losses(table, matters, options, epoch)
                if options.inspect is not None:
                    options.inspect.after_epoch(networks, movers.leaves())
                losses = (weights * table).sum(0) / weights.sum(0)
                if options.scheduler_interval == "epoch":
                    movers.schedule(losses)
                _check_leaves(movers.leaves(), matters, options, epoch)
                show(losses)
                ends = watcher is not None and watcher.after_epoch(present)
                if options.callback and options.callback(epoch, losses, networks.assemble(movers.leaves())):
                    ends = True
                if ends:
                    break
        return networks.assemble(movers.leaves())


def _run_epoch(
    batches: Iterable[Batch | RaggedBatch],
    networks: Networks,
    movers: Movers,
    gradients: Gradients,
    options: Options,
    after_step: Callable[[], None] | None,
) -> tuple[Tensor, Tensor]:
    """Go through the data once; losses ``(steps, K)``, and the numbers of rows they are means over."""
    losses, rows = [], []
    for batch in batches:
        if networks.num_steps == 0:
            networks.probe(batch)
        try:
            losses.append(movers.step(gradients, networks, batch))
        except Exception:
            networks.probe(batch)  # says so if the targets of this batch are no targets
            raise
        rows.append(torch.as_tensor(batch.rows))
        networks.num_steps += 1
        if options.scheduler_interval == "step":
            movers.schedule(losses[-1])
        if after_step is not None:
            after_step()
    # Looked at once an epoch, for on an accelerator every look makes it wait.
    table = torch.stack(losses).cpu()
    return table, torch.stack([r.expand(table.shape[1]) for r in rows]).to(table.dtype)


def _check_losses(table: Tensor, matters: Tensor, options: Options, epoch: int) -> None:
    bad = (~table.isfinite() & matters).nonzero()
    if len(bad):
        step, k = bad[0].tolist()
        member, loss = _of_member(k, options, table.shape[1]), table[step, k].item()
        raise RuntimeError(
            f"The loss{member} in `{options.call}` is {loss} in step {step} of epoch {epoch}."
            " A lower learning rate, or `max_grad_norm=1.0`, usually helps."
        )


def _check_leaves(leaves: Sequence[Tensor], matters: Tensor, options: Options, epoch: int) -> None:
    """Refuse parameters that the last step has made infinite, which no loss has shown yet."""
    # A sum is finite only if what is summed is, and takes a third of the time.
    if bool(torch.stack([leaf.sum() for leaf in leaves]).isfinite().all()):
        return
    fine = torch.stack([leaf.isfinite().reshape(len(leaf), -1).all(1) for leaf in leaves]).all(0)
    fine = fine.cpu() | ~matters
    if not bool(fine.all()):
        member = _of_member(int((~fine).nonzero()[0]), options, len(fine))
        raise RuntimeError(
            f"The parameters{member} in `{options.call}` are not finite after epoch {epoch}."
            " A lower learning rate, or `max_grad_norm=1.0`, usually helps."
        )


def _of_member(k: int, options: Options, num_networks: int) -> str:
    number = k if num_networks > 1 else options.member
    return "" if number is None else f" of member {number}"


@contextmanager
def _bar(options: Options) -> Iterator[Callable[[Tensor], None]]:
    """Show a bar over the epochs, if it is asked for."""
    if not options.progress:
        yield lambda losses: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=options.num_epochs, desc=options.call, unit="epoch") as bar:

        def show(losses: Tensor) -> None:
            bar.set_postfix(options.shown(losses), refresh=False)
            bar.update()

        yield show
