"""Move tokens to experts over gloo with the interface of DeepEP, whose kernels need NVLink.

It has the methods that Axolotl's expert parallelism calls, and moves the same tokens.
"""

import torch
import torch.distributed as dist


class Buffer:
    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False):
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    @staticmethod
    def get_dispatch_config(ranks):
        return None

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx, num_experts):
        """Count the tokens that go to each rank; an expert of -1 is none."""
        here = num_experts // self.ranks
        owner = torch.where(topk_idx >= 0, topk_idx // here, -1)
        goes = torch.stack([(owner == rank).any(1) for rank in range(self.ranks)], 1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return goes.sum(0), None, per_expert, goes, None

    def _moved(self, rows, out, given):
        moved = rows.new_empty((sum(out), *rows.shape[1:]))
        dist.all_to_all_single(moved, rows.contiguous(), out, given, group=self.group)
        return moved

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        config=None,
    ):
        """Send each token once to each rank that has one of its experts."""
        if handle is not None:  # the gradient of `combine`'s results takes the same way
            places, sent, received, _ = handle
            return self._moved(x[places], received, sent), None, None, None, None, None
        places = torch.cat([column.nonzero()[:, 0] for column in is_token_in_rank.T])
        sent = num_tokens_per_rank.tolist()
        counts = self._moved(num_tokens_per_rank, [1] * self.ranks, [1] * self.ranks)
        received = counts.tolist()
        here = len(num_tokens_per_expert) // self.ranks
        experts = self._moved(topk_idx[places], received, sent) - self.rank * here
        away = (experts < 0) | (experts >= here)
        weights = self._moved(topk_weights[places], received, sent).masked_fill(away, 0.0)
        handle = (places, sent, received, len(x))
        tokens = self._moved(x[places], received, sent)
        return tokens, experts.masked_fill(away, -1), weights, received, handle, None

    def combine(self, x, handle, topk_weights=None, config=None):
        """Send each token's results back to its rank, and add them up."""
        places, sent, received, tokens = handle

        def back(rows):
            found = rows.new_zeros((tokens, *rows.shape[1:]))
            return found.index_add_(0, places, self._moved(rows, sent, received))

        return back(x), None if topk_weights is None else back(topk_weights), None
