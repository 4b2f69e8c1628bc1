"""Guesses by a head, which reads what layers of the model made of the tokens: EAGLE-3, MTP.

At each place the head reads the hidden states there and the token one place later, and says what comes
after that. So it reads every step of the model, once the tokens of the step are known. It has pools of its
own, and a sequence has the same pages in both. The first guess follows from the newest token, and each other
one from the guess before and what the head itself made of it. K and V of guesses lie where the head reads on,
and are written again then.

Where pages are shared, what the head has at the last place of one is of the token that followed there first.
It decides how good the guesses are, and never a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ad_flashinfer_pass.runtime.drafts.drafter import DraftedSequence, Drafter
from ad_flashinfer_pass.runtime.sampling import most_likely
from ad_flashinfer_pass.runtime.sequence_info import SequenceInfo


class DraftHead(nn.Module):
    """A head, in eval mode, on the device of the model that it guesses for.

    Args:
        body: the part that has a cache: from a token's embedding and a hidden state, side by side as
            inputs_embeds [b, s, 2 * d], to logits.
        embed: tokens to vectors, that of the model or its own.
        reads: paths of the modules of the model whose results it reads, in order.
        own: path of the module of ``body`` whose result is read beside its own guesses.
        project: from what the model gives to the width of ``own``; None: it has that width.
        token_ids: int64, the token of the model for each of the body's; None: they are the same.
    """

    def __init__(
        self,
        body: nn.Module,
        embed: nn.Module,
        reads: Sequence[str],
        own: str,
        project: nn.Module | None = None,
        token_ids: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.body, self.embed, self.project, self.reads, self.own = body, embed, project, tuple(reads), own
        self.token_ids: Tensor | None
        self.register_buffer("token_ids", token_ids, persistent=False)
        self.eval().requires_grad_(False)


class HeadDrafter(Drafter):
    """A head.

    Args:
        info: whose steps verify drafts; with ``has_next``.
        own: of the same sizes, whose tensors are the inputs of ``module`` but for steps of ``info``.
        head: what was transformed.
        module: the transformed ``head.body``, which is captured with the end of all steps.
        caches: its pools by name, and what it keeps of its own hidden states.
        hidden: [tokens, width], what the model keeps of its own in each step.
    """

    def __init__(
        self,
        info: SequenceInfo,
        own: SequenceInfo,
        head: DraftHead,
        module: nn.Module,
        caches: Mapping[str, Tensor],
        hidden: Tensor,
    ) -> None:
        self._info, self._own, self._head, self._hidden = info, own, head, hidden
        self._module, self.caches, self._own_hidden = module, caches, caches["hidden_states"]
        self._last = self._own_hidden.new_zeros(info.num_slots, self._own_hidden.shape[1])
        """By slot: what the head reads beside the newest token of a sequence."""

    def begin(self, sequences: Sequence[DraftedSequence]) -> None:
        """Nothing is left to read; see ``Drafter.begin``."""

    def read(self) -> None:
        """See ``Drafter.read``."""
        info, own = self._info, self._own
        if info.advances:
            width = 1 + info.num_drafts if info.num_verified else 1
            last = own.look_back(info, info.tokens[: info.num_rows * width].view(-1, width))
            args = own.named_args()
            args["token_gather_indices"] = args["token_gather_indices"][:0]
        else:
            given, last = info.next_args(), info.views["cu_seqlen"][1 : info.num_rows + 1].long() - 1
            args = {name: given[name] for name in own.named_args()}  # the model may take lengths besides
        hidden = self._read_hidden(args["input_ids"].numel())
        self._keep(hidden[last])
        self._run(args, hidden)

    def propose(self, accepted: Tensor | None = None) -> None:
        """See ``Drafter.propose``."""
        info, own, drafts = self._info, self._own, self._info.drafts
        if accepted is None:
            own.follow(info, back=1)
            last = torch.arange(len(drafts), device=info.device)
            hidden = self._last[info.views["slot_idx"][: len(drafts)]]
        else:
            last = own.look_back(info, accepted)
            hidden = self._read_hidden(accepted.numel())
            self._keep(hidden[last])
        self._guess(hidden, 1)
        state = self._own_hidden[last]
        if drafts.shape[1] > 2:
            own.follow(info)
        for place in range(2, drafts.shape[1]):
            own.views["input_ids"][: len(drafts)] = drafts[:, place - 1]
            self._guess(state, place)
            state = self._own_hidden[: len(drafts)]

    def _guess(self, hidden: Tensor, place: int) -> None:
        """Run the step that ``own`` has, choose its most likely tokens, and go on by one if they decode."""
        own, drafts = self._own, self._info.drafts
        logits = self._run(own.named_args(), hidden)
        if logits.is_cuda:
            own.sample_and_advance(logits, is_greedy=True)
        else:
            own.advance(most_likely(logits))
        tokens = own.tokens[: len(drafts)].clamp(min=0)
        drafts[:, place] = tokens if self._head.token_ids is None else self._head.token_ids[tokens]

    def _read_hidden(self, num_tokens: int) -> Tensor:
        """What the model made of the tokens of its last step, as the head takes it."""
        hidden = self._hidden[:num_tokens]
        return hidden if self._head.project is None else self._head.project(hidden)

    def _keep(self, hidden: Tensor) -> None:
        self._last[self._info.views["slot_idx"][: len(hidden)]] = hidden

    def _run(self, args: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """Logits [rows, vocabulary of the head]."""
        ids = args.pop("input_ids")
        args["inputs_embeds"] = torch.cat([self._head.embed(ids), hidden.view(*ids.shape, -1)], dim=-1)
        logits: Tensor = self._module(**args, **self.caches)[0]
        return logits
