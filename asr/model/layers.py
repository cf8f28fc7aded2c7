"""Feed-forward and convolution modules, norms and activations, what streams keep, how parameters start.

N streams · T frames · C channels · K kernel
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.model.shaping import happens, limit_param_value

Norm = Literal["layer_norm", "batch_norm"]


class FeedForward(nn.Sequential):
    """Norm, expand, activate, contract; (N, T, C) -> (N, T, C)."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        dropout: float,
        activation: type[nn.Module] = nn.SiLU,
        bias: bool = True,
    ) -> None:
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden_dim, bias),
            activation(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim, bias),
            nn.Dropout(dropout),
        )


class ConvModule(nn.Module):
    """The Conformer's convolution module (arXiv:2005.08100, section 2.2), causal or symmetric.

    The state is kept behind the gate, where silence before an utterance is exactly zero.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        dropout: float,
        *,
        causal: bool = True,
        norm: Norm = "layer_norm",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gated = nn.Linear(dim, 2 * dim, bias)
        sides = (0, 0 if causal else kernel_size // 2)
        self.depthwise = nn.Conv2d(dim, dim, (1, kernel_size), padding=sides, groups=dim, bias=bias)
        # as its gradient is laid out on a CPU, which DistributedDataParallel would copy otherwise
        self.depthwise.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.depthwise_norm = nn.BatchNorm1d(dim) if norm == "batch_norm" else nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, past: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, T, C), past (N, C, K - 1), or (N, C, 0) where it is symmetric; exists (N, T, 1): False for
        frames before the utterance, and, where it is symmetric or has batch norm, for those behind.

        Returns (N, T, C), and what the convolution saw, (N, C, K - 1 + T), of which a stream keeps the end.
        """
        x = torch.where(exists, F.glu(self.gated(self.norm(x)), dim=-1), 0.0)
        seen = torch.cat([past.transpose(1, 2), x], dim=1).transpose(1, 2)
        x = self.depthwise(seen[:, :, None])[:, :, 0].transpose(1, 2)
        x = self.out(F.silu(self._normalise(x, exists)))
        return self.dropout(x), seen

    def _normalise(self, x: Tensor, exists: Tensor) -> Tensor:
        """x (N, T, C). The statistics of batch norm are those of frames that count, whatever the padding."""
        norm = self.depthwise_norm
        if isinstance(norm, nn.LayerNorm):
            return norm(x)
        if not norm.training:
            return norm(x.transpose(1, 2)).transpose(1, 2)
        counts = exists.squeeze(-1)
        y = torch.zeros_like(x)
        y[counts] = norm(x[counts]).to(x.dtype)
        return y


class BiasNorm(nn.Module):
    """LayerNorm that keeps a part of the length of its input (arXiv:2310.11230, section 3.3).

    y = x * exp(g) / rms(x - b), without an epsilon: b, which is learnt, is what the length is compared with.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.empty(dim).normal_(std=1e-4))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C)."""
        log_scale: Tensor = self.log_scale
        if self.training and happens(0.6):
            log_scale = limit_param_value(log_scale, -1.5, 1.5)
        inverse = (x - self.bias).float().square().mean(-1, keepdim=True) ** -0.5
        return x * (inverse * log_scale.exp()).to(x.dtype)


def swoosh_l(x: Tensor) -> Tensor:
    """log(1 + exp(x - 4)) - 0.08 x - 0.035, for layers whose input would rather be off (arXiv:2310.11230)."""
    return _swoosh(x, 4.0, 0.035)


def swoosh_r(x: Tensor) -> Tensor:
    """log(1 + exp(x - 1)) - 0.08 x - 0.313261687, which is 0 at 0."""
    return _swoosh(x, 1.0, 0.313261687)


def _swoosh(x: Tensor, shift: float, offset: float) -> Tensor:
    wide = x.float()  # the gradient of a half-precision product overflows
    return F.softplus(wide - shift).sub_(wide, alpha=0.08).sub_(offset).to(x.dtype)


def may_be_cut() -> bool:
    """Whether what is long may be computed a piece at a time, which keeps it in the cache of a processor:
    nobody asks for gradients, nor for a graph."""
    return not (torch.is_grad_enabled() or torch.compiler.is_exporting())


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


def scaled(module: nn.Module, scale: float) -> nn.Module:
    """Let a map start as torch does, times `scale`, and its bias uniform within a tenth of that."""
    with torch.no_grad():
        module.get_parameter("weight").mul_(scale)
        if getattr(module, "bias", None) is not None:
            nn.init.uniform_(module.get_parameter("bias"), -0.1 * scale, 0.1 * scale)
    return module


def start_small(*ends: nn.Module) -> None:
    """Let linear maps that end a residual branch start at a tenth, so that signal and gradients pass it by.

    With full size a small Conformer learns nothing of its alignment for several times as long.
    """
    for end in ends:
        weight = end.get_parameter("weight")
        nn.init.normal_(weight, std=0.1 * weight.shape[1] ** -0.5)
