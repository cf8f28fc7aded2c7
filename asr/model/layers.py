"""Feed-forward and convolution modules, what streams keep, and how parameters start.

N streams · T frames · C channels · K kernel
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Sequential):
    """Norm, expand, activate, contract; (N, T, C) -> (N, T, C)."""

    def __init__(
        self, dim: int, hidden_dim: int, dropout: float, activation: type[nn.Module] = nn.SiLU
    ) -> None:
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden_dim),
            activation(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim),
            nn.Dropout(dropout),
        )


class ConvModule(nn.Module):
    """The Conformer's convolution module, causal and with LayerNorm (arXiv:2005.08100, section 2.2).

    The state is kept behind the gate, where silence before an utterance is exactly zero.
    """

    def __init__(self, dim: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gated = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv2d(dim, dim, (1, kernel_size), groups=dim)
        # as its gradient is laid out on a CPU, which DistributedDataParallel would copy otherwise
        self.depthwise.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.depthwise_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, past: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, T, C), past (N, C, K - 1); exists (N, T, 1): False for frames before the utterance.

        Returns (N, T, C), and what the convolution saw, (N, C, K - 1 + T), of which a stream keeps the end.
        """
        x = torch.where(exists, F.glu(self.gated(self.norm(x)), dim=-1), 0.0)
        seen = torch.cat([past.transpose(1, 2), x], dim=1).transpose(1, 2)
        x = self.depthwise(seen[:, :, None])[:, :, 0].transpose(1, 2)
        x = self.out(F.silu(self.depthwise_norm(x)))
        return self.dropout(x), seen


def append(past: Tensor, x: Tensor, dim: int) -> Tensor:
    """past and x along `dim`, in the type of x: a state is float32, and autocast would make all of it so."""
    return torch.cat([past.to(x.dtype), x], dim)


def keep(x: Tensor, lens: Tensor, width: int, dim: int) -> Tensor:
    """The `width` entries that end at width + lens (N,) along `dim`: what the next call needs.

    x (N, ..., width + T, ...), where the last T - lens entries of a stream are padding.
    """
    index = lens[:, None] + torch.arange(width, device=lens.device)
    # whole rows behind `dim` are copied, which is several times faster than a gather of single numbers
    length, shape = x.shape[dim], [*x.shape[:dim], width, *x.shape[dim + 1 :]]
    groups = x.shape[1:dim].numel()
    first = torch.arange(x.shape[0] * groups, device=x.device).view(-1, groups, 1) * length
    rows = (first + index[:, None]).flatten()
    return x.flatten(0, dim).index_select(0, rows).view(shape)


def initialise(module: nn.Module) -> None:
    """Keep the variance of the input and start without a bias.

    As torch starts convolutions, those of the subsampling shrink the signal to a hundredth, far below their
    biases, and training spends its first thousand steps undoing that.
    """
    if isinstance(module, nn.Linear):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def start_small(*ends: nn.Module) -> None:
    """Let linear maps that end a residual branch start at a tenth, so that signal and gradients pass it by.

    With full size a small Conformer learns nothing of its alignment for several times as long.
    """
    for end in ends:
        weight = end.get_parameter("weight")
        nn.init.normal_(weight, std=0.1 * weight.shape[1] ** -0.5)
