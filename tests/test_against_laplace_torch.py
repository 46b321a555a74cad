"""The released laplace-torch finds the same posteriors, evidence and predictions, where conventions meet."""

import math
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from zoo import F64, randn, seeded

import funcbayes as fb
from funcbayes._tree import named_leaves
from funcbayes.likelihoods import Categorical, Normal


def released() -> Any:
    """``laplace.Laplace``; where it cannot be imported the tests of this file are skipped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from laplace import Laplace
    except ImportError as error:
        pytest.skip(f"pip install 'funcbayes[bench]' ({error})", allow_module_level=True)
    except Exception as error:  # noqa: BLE001  # a broken torchvision raises what it likes
        pytest.skip(f"laplace-torch cannot be imported here: {error}", allow_module_level=True)
    return Laplace


Laplace = released()
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the other package

PRIOR, NOISE, TEMPERATURE = 0.7, 0.4, 0.8


def made(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double().eval()


def mlp(num_outputs):
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, num_outputs))


def conv_net(num_outputs):
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 2, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, num_outputs),
    )


NETWORKS = {"mlp": (mlp, (3,)), "conv": (conv_net, (2, 5, 5))}
NUM_ROWS, NUM_NEW = 11, 4


class Pair(NamedTuple):
    """One network in both packages, fitted to the same rows."""

    theirs: Any
    fn: Any
    params: Any
    curvature: Any
    posterior: fb.Gaussian
    new: Tensor
    order: Tensor
    likelihood: Any

    @property
    def numbers(self):
        noise = NOISE if isinstance(self.likelihood, Normal) else None
        return {"prior_precision": PRIOR, "noise_std": noise, "temperature": TEMPERATURE}


def pair(task, name, structure, subset) -> Pair:
    make, shape = NETWORKS[name]
    num_outputs = 2 if task == "regression" else 3
    module = made(lambda: make(num_outputs))
    x, new = randn(NUM_ROWS, *shape), randn(NUM_NEW, *shape, seed=1)
    if task == "regression":
        y, likelihood = randn(NUM_ROWS, num_outputs, seed=2), Normal(1.0)
    else:
        y, likelihood = torch.randint(num_outputs, (NUM_ROWS,), generator=seeded(2)), Categorical()
    options = {"sigma_noise": NOISE} if task == "regression" else {}
    theirs = Laplace(
        *(made(lambda: make(num_outputs)), task),
        subset_of_weights=subset,
        hessian_structure=structure,
        prior_precision=PRIOR,
        temperature=TEMPERATURE,
        **options,
    )
    theirs.fit(DataLoader(TensorDataset(x, y), batch_size=4))
    fn, params = fb.make_functional(module)
    last = max(int(path.split(".")[0]) for path in params)
    where = None if subset == "all" else f"{last}.*"
    c = fb.curvature.ggn(fn, params, (x, y), likelihood, structure, where)
    covered = [path for path, _ in module.named_parameters() if path in c.leaves]
    found = Pair(theirs, fn, params, c, None, new, order_of(params, covered), likelihood)
    return found._replace(posterior=fb.laplace.posterior(params, c, **found.numbers))


def order_of(params, paths):
    """Places of our numbers, whose leaves are sorted by path, in the order of ``paths``."""
    starts, start = {}, 0
    for path in sorted(paths):
        starts[path] = start
        start += params[path].numel()
    return torch.cat([torch.arange(params[p].numel()) + starts[p] for p in paths])


def precision_of(posterior):
    return posterior.covariance.to_dense().inverse()


def evidence_of(p, noise_std, *numbers):
    """Theirs, in our convention."""
    found = p.theirs.log_marginal_likelihood(*numbers).reshape(())
    if noise_std is None:
        return found
    # They divide squared residuals by the temperature, we all of the log likelihood.
    normalizer = -NUM_ROWS * 2 * math.log(noise_std * math.sqrt(2 * math.pi))
    return found + normalizer * (1 / TEMPERATURE - 1)


every_task = pytest.mark.parametrize("task", ["regression", "classification"])
every_network = pytest.mark.parametrize("name", NETWORKS)
every_structure = pytest.mark.parametrize("structure", ["diag", "kron", "full"])
every_subset = pytest.mark.parametrize("subset", ["all", "last_layer"])


@every_task
@every_network
@every_structure
@every_subset
def test_precision_evidence_and_predictive_are_those_of_laplace_torch(task, name, structure, subset):
    p = pair(task, name, structure, subset)
    # The precision of the posterior.
    ours = precision_of(p.posterior)[p.order][:, p.order]
    theirs = p.theirs.posterior_precision
    if structure == "kron":
        theirs = theirs.to_matrix()
    elif structure == "diag":
        theirs = torch.diag(theirs)
    assert_close(ours, theirs, check_dtype=False, rtol=1e-5, atol=1e-6)
    # The evidence.
    ours = fb.laplace.log_marginal_likelihood(p.params, p.curvature, **p.numbers)
    theirs = evidence_of(p, p.numbers["noise_std"])
    assert_close(ours, theirs, check_dtype=False, rtol=1e-5, atol=1e-5)
    # Outputs: it leaves noise out of the variance, as we do of that of the outputs.
    found = fb.predict_linearized(p.fn, p.params, p.posterior, p.new)
    mean, covariance = p.theirs._glm_predictive_distribution(p.new)
    tolerance = {"check_dtype": False, "rtol": 1e-5, "atol": 1e-6}
    assert_close(found.output_mean, mean, **tolerance)
    assert_close(found.output_covariance, covariance, **tolerance)
    joint = fb.predict_linearized(p.fn, p.params, p.posterior, p.new, joint=True).joint_covariance
    _, theirs_joint = p.theirs._glm_predictive_distribution(p.new, joint=True)
    assert_close(joint, theirs_joint, **tolerance)


@every_network
@every_structure
@every_subset
@pytest.mark.parametrize("link", ["probit", "bridge", "bridge_norm"])
def test_probabilities_are_those_of_laplace_torch(name, structure, subset, link):
    p = pair("classification", name, structure, subset)
    found = fb.predict_linearized(p.fn, p.params, p.posterior, p.new, likelihood=Categorical(), link=link)
    theirs = p.theirs(p.new, pred_type="glm", link_approx=link)
    assert_close(found.mean, theirs, check_dtype=False, rtol=1e-5, atol=1e-6)


@every_structure
@every_task
def test_evidence_under_other_priors_and_noise_is_that_of_laplace_torch(task, structure):
    p = pair(task, "mlp", structure, "all")
    paths = [path for path, _ in made(lambda: mlp(1)).named_parameters()]
    numbers = torch.linspace(0.3, 2.0, len(paths), dtype=F64)
    ours = {**p.numbers, "prior_precision": dict(zip(paths, numbers.tolist(), strict=True))}
    ours["noise_std"] = noise = None if task == "classification" else 1.3
    found = fb.laplace.log_marginal_likelihood(p.params, p.curvature, **ours)
    theirs = evidence_of(p, noise, numbers, noise and torch.tensor(noise, dtype=F64))
    assert_close(found, theirs, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_the_leaves_of_a_posterior_have_its_order():
    p = pair("regression", "mlp", "diag", "all")
    flat = torch.cat([leaf.reshape(-1) for leaf in named_leaves(p.posterior.mean).values()])[p.order]
    assert_close(flat, p.theirs.mean)
    assert math.prod(p.theirs.mean.shape) == len(p.order)
