"""Feed-forward and convolution modules, norms, activations, stream caches, and initialisation.

N streams · T frames · C channels · K kernel
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.model.shaping import happens, limit_param_value

Norm = Literal["layer_norm", "batch_norm"]


class FeedForward(nn.Sequential):
    """Norm, expansion, activation, projection; (N, T, C) -> (N, T, C)."""

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

    A stream caches the output of the gate, where frames before the utterance are exactly zero.
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
        # matches the layout of its gradient on a CPU, which DistributedDataParallel would copy otherwise
        self.depthwise.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.depthwise_norm = nn.BatchNorm1d(dim) if norm == "batch_norm" else nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, past: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, T, C); past (N, C, K - 1), or (N, C, 0) if symmetric; exists (N, T, 1): False for frames
        before the utterance and, if the module is symmetric or has batch norm, for those after it.

        Returns (N, T, C), and the convolution's input (N, C, K - 1 + T), whose end a stream keeps.
        """
        x = torch.where(exists, F.glu(self.gated(self.norm(x)), dim=-1), 0.0)
        seen = torch.cat([past.transpose(1, 2), x], dim=1).transpose(1, 2)
        x = self.depthwise(seen[:, :, None])[:, :, 0].transpose(1, 2)
        x = self.out(F.silu(self._normalise(x, exists)))
        return self.dropout(x), seen

    def _normalise(self, x: Tensor, exists: Tensor) -> Tensor:
        """x (N, T, C). The statistics of batch norm cover valid frames only, not padding."""
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
    """LayerNorm that retains some information on the length of its input (arXiv:2310.11230, section 3.3).

    y = x * exp(g) / rms(x - b), without an epsilon; the learnt b is the reference for the length.
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
    """log(1 + exp(x - 4)) - 0.08 x - 0.035, for modules that are normally off (arXiv:2310.11230)."""
    return _swoosh(x, 4.0, 0.035)


def swoosh_r(x: Tensor) -> Tensor:
    """log(1 + exp(x - 1)) - 0.08 x - 0.313261687, which is 0 at 0."""
    return _swoosh(x, 1.0, 0.313261687)


def _swoosh(x: Tensor, shift: float, offset: float) -> Tensor:
    wide = x.float()  # in half precision the gradient overflows
    return F.softplus(wide - shift).sub_(wide, alpha=0.08).sub_(offset).to(x.dtype)


def may_be_cut() -> bool:
    """Whether long inputs may be computed in pieces, which fit the CPU cache: only without gradients and
    outside of export."""
    return not (torch.is_grad_enabled() or torch.compiler.is_exporting())


def append(past: Tensor, x: Tensor, dim: int) -> Tensor:
    """Concatenate past and x along `dim` in the dtype of x; autocast would take float32, that of past."""
    return torch.cat([past.to(x.dtype), x], dim)


def keep(x: Tensor, lens: Tensor, width: int, dim: int) -> Tensor:
    """The `width` entries that end at width + lens (N,) along `dim`: what the next call needs.

    x (N, ..., width + T, ...), where the last T - lens entries of a stream are padding.
    """
    index = lens[:, None] + torch.arange(width, device=lens.device)
    # copies whole rows of the dimensions after `dim`, several times faster than a gather of single elements
    length, shape = x.shape[dim], [*x.shape[:dim], width, *x.shape[dim + 1 :]]
    groups = x.shape[1:dim].numel()
    first = torch.arange(x.shape[0] * groups, device=x.device).view(-1, groups, 1) * length
    rows = (first + index[:, None]).flatten()
    return x.flatten(0, dim).index_select(0, rows).view(shape)


def initialise(module: nn.Module) -> None:
    """Initialise to keep the variance of the input, with zero biases.

    By torch's default, the subsampling convolutions shrink the signal to a hundredth, far below their biases,
    and training spends its first thousand steps undoing that.
    """
    if isinstance(module, nn.Linear):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def scaled(module: nn.Module, scale: float) -> nn.Module:
    """Scale torch's initial weights by `scale`; draw the bias uniformly from +-0.1 * scale."""
    with torch.no_grad():
        module.get_parameter("weight").mul_(scale)
        if getattr(module, "bias", None) is not None:
            nn.init.uniform_(module.get_parameter("bias"), -0.1 * scale, 0.1 * scale)
    return module


def start_small(*ends: nn.Module) -> None:
    """Start the last linear map of a residual branch at a tenth, so signal and gradients bypass the branch.

    At full scale, a small Conformer takes several times as long before it learns any alignment.
    """
    for end in ends:
        weight = end.get_parameter("weight")
        nn.init.normal_(weight, std=0.1 * weight.shape[1] ** -0.5)
