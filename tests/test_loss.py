import torch
import torch.nn.functional as F

from raybooth.loss import prior_preserving, row_errors


def test_it_is_the_papers_loss():
    prediction, target = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8)
    weights = torch.tensor([1.0, 1, 1, 0.7, 0.7, 0.7])
    ours = prior_preserving(row_errors(prediction, target), weights, instance_rows=3)
    papers = F.mse_loss(prediction[:3], target[:3]) + 0.7 * F.mse_loss(prediction[3:], target[3:])
    torch.testing.assert_close(ours, papers)


def test_shares_of_workers_add_up_to_the_whole():
    errors, weights = torch.rand(8), torch.tensor([1.0] * 4 + [0.5] * 4)
    whole = prior_preserving(errors, weights, 4)
    shares = sum(prior_preserving(errors[r::3], weights[r::3], 4) for r in range(3))
    torch.testing.assert_close(shares, whole)
