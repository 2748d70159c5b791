"""The prior-preserving loss (Ruiz et al. 2023, eq. 2) over weighted rows."""

from torch import Tensor


def row_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row: (n, c, h, w) twice -> (n,), float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def prior_preserving(errors: Tensor, weights: Tensor, instance_rows: int) -> Tensor:
    """sum(w_i * mse_i) / (number of instance rows); instance rows weigh 1, class rows the prior's weight.

    With as many class rows as instance rows this is the paper's mse_instance + weight * mse_class. A worker that holds
    some of the rows passes the count over *all* workers; the sum over workers is then the loss.
    """
    return (weights * errors).sum() / instance_rows
