"""Methods as modules: they hold modules, and give what the functions of the package give."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from zoo import F64, randn

import funcbayes as fb
from funcbayes.likelihoods import Categorical, Normal
from funcbayes.modules import (
    SWAG,
    DeepEnsemble,
    GaussianLinear,
    LaplaceApproximation,
    MCDropout,
    VariationalBayesNN,
)

N = 6


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def mlp(outputs=3, dropout=0.3):
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, outputs))


def conv_net():
    body = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(16, 3))


def signal(outputs=1):
    """Outputs of three axes: values, unless it is said that they are logits."""
    return nn.Sequential(nn.Dropout(0.2), nn.Conv1d(2, outputs, 1))


def nudged(model, seed, scale=0.1):
    """The model a step of training later, in place."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return model


def swag(model, num=5, **options):
    face = SWAG(model, **options)
    trained = copy.deepcopy(model)
    for step in range(num):
        face.collect_model(nudged(trained, step))
    return face


def ensemble(make=mlp, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return DeepEnsemble(lambda: make().double(), **options)


def laplace(model, **options):
    """Fitted to random targets of the kind that outputs are for."""
    face = LaplaceApproximation(model, num_samples=20, **options)
    face.fit(data_for(model, options.get("likelihood")))
    return face


def variational(model, **options):
    return VariationalBayesNN(model, num_samples=20, init_scale=0.1, **options)


def data_for(model, likelihood=None):
    first = next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d))
    shape = {nn.Linear: (4,), nn.Conv1d: (2, 5), nn.Conv2d: (2, 4, 4)}[type(first)]
    x = randn(12, *shape, seed=5)
    outputs = copy.deepcopy(model).eval()(x).detach()
    g = torch.Generator().manual_seed(6)
    if isinstance(likelihood, Categorical):
        return x, torch.randint(outputs.shape[1], (12, *outputs.shape[2:]), generator=g)
    if likelihood == "regression" or (likelihood is None and (outputs.ndim > 2 or outputs.shape[1] == 1)):
        return x, randn(*outputs.shape, seed=7)
    if outputs.shape[1] == 1:
        return x, torch.randint(2, outputs.shape, generator=g)
    return x, torch.randint(outputs.shape[1], (12,), generator=g)


FACES = {
    "mc_dropout": lambda make, **options: MCDropout(seeded(make), **options),
    "deep_ensemble": lambda make, **options: ensemble(make, **options),
    "swag": lambda make, **options: swag(seeded(make), **options),
    "laplace": lambda make, **options: laplace(seeded(make), **options),
    "variational": lambda make, **options: variational(seeded(make), **options),
}
faces = pytest.mark.parametrize("make_face", FACES.values(), ids=FACES.keys())
MODELS = {
    "classes": (mlp, (4,), True),
    "numbers": (functools.partial(mlp, 1), (4,), False),
    "images": (conv_net, (2, 4, 4), True),
    "signals": (signal, (2, 5), False),
}
models = pytest.mark.parametrize(("make", "shape", "classifies"), MODELS.values(), ids=MODELS.keys())


# What all of them do.


@faces
@models
def test_moments_are_those_of_the_draws(make_face, make, shape, classifies):
    face, x = make_face(make), randn(N, *shape)
    mean, variance, samples = face.predict(x, return_samples=True, seed=1)
    num = {"DeepEnsemble": 5}.get(type(face).__name__, 20)
    assert samples.shape[:2] == (num, N)
    assert_close(mean, samples.mean(0))
    assert_close(variance, samples.var(0))
    assert variance.min() >= 0
    assert variance.max() > 0
    if classifies:
        assert_close(samples.sum(-1), torch.ones(num, N, dtype=F64))
    for again in (face.predict(x, seed=1), face.predict(x, return_all=True, seed=1)[:2]):
        assert_close(again[0], mean)
        assert_close(again[1], variance)


@faces
@pytest.mark.parametrize(
    ("make", "shape", "likelihood", "classifies"),
    [
        (mlp, (4,), None, True),
        (mlp, (4,), "regression", False),
        (mlp, (4,), "classification", True),
        (functools.partial(mlp, 1), (4,), None, False),
        (functools.partial(signal, 3), (2, 5), None, False),
        (functools.partial(signal, 3), (2, 5), Categorical(class_axis=1), True),
    ],
)
def test_an_argument_says_whether_outputs_are_class_logits(make_face, make, shape, likelihood, classifies):
    face, x = make_face(make, likelihood=likelihood), randn(N, *shape)
    samples = face.predict(x, return_samples=True, seed=0)[2]
    sums_to_one = any(
        torch.allclose(samples.sum(axis), torch.ones((), dtype=F64)) for axis in range(2, samples.ndim)
    )
    assert sums_to_one == classifies


@faces
def test_one_logit_is_that_of_the_second_class(make_face):
    face, x = make_face(functools.partial(mlp, 1), likelihood="classification"), randn(N, 4)
    mean, _, samples = face.predict(x, return_samples=True, seed=0)
    other = copy.deepcopy(face)
    other.likelihood = "regression"
    values = other.predict(x, return_samples=True, seed=0)[2]
    assert_close(samples, values.sigmoid())
    assert_close(mean, samples.mean(0))
    if isinstance(face, MCDropout):
        p = mean[:, 0]
        expected = -(p * p.log() + (1 - p) * (1 - p).log())
        assert_close(face.predict_entropy(x, seed=0).reshape(N), expected)


@faces
def test_more_axes_of_class_logits_need_to_be_told_apart(make_face):
    with pytest.raises(ValueError, match=r"which axis.*\([16], 3, 5\).*class_axis=1"):
        make_face(functools.partial(signal, 3), likelihood="classification").predict(randn(N, 2, 5))


@faces
def test_seeds_and_the_global_state_govern_predictions(make_face):
    face, x = make_face(mlp), randn(N, 4)
    assert_close(face.predict(x, seed=4)[0], face.predict(x, seed=4)[0])
    if not isinstance(face, DeepEnsemble):
        assert not torch.allclose(face.predict(x, seed=4)[0], face.predict(x, seed=5)[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = face.predict(x)[0]
        torch.manual_seed(0)
        assert_close(face.predict(x)[0], first)


@faces
@pytest.mark.parametrize("training", [True, False])
def test_predicting_changes_nothing_and_makes_no_graph(make_face, training):
    face, x = make_face(conv_net).train(training), randn(N, 2, 4, 4)
    before = copy.deepcopy({k: v for k, v in face.state_dict().items() if isinstance(v, torch.Tensor)})
    results = face.predict(x, return_samples=True, seed=0)
    assert not any(result.requires_grad for result in results)
    assert face.training == training
    for name, value in before.items():
        assert torch.equal(face.state_dict()[name], value)
    assert all(p.grad is None for p in face.parameters())


@faces
def test_a_state_dict_makes_another_face_predict_the_same(make_face, tmp_path):
    face, x = make_face(conv_net), randn(N, 2, 4, 4)
    other = {
        "MCDropout": lambda: MCDropout(seeded(conv_net, 9)),
        "DeepEnsemble": lambda: DeepEnsemble(lambda: seeded(conv_net, 9)),
        "SWAG": lambda: SWAG(seeded(conv_net, 9)),
        "LaplaceApproximation": lambda: LaplaceApproximation(seeded(conv_net, 9), num_samples=20),
        "VariationalBayesNN": lambda: VariationalBayesNN(seeded(conv_net, 9), num_samples=20),
    }[type(face).__name__]()
    torch.save(face.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one, two in zip(face.predict(x, seed=0), other.predict(x, seed=0), strict=True):
        assert_close(one, two)


@faces
def test_faces_are_modules_that_can_be_copied_and_converted(make_face):
    face = make_face(mlp)
    x = randn(N, 4)
    assert_close(copy.deepcopy(face).predict(x, seed=0)[0], face.predict(x, seed=0)[0])
    single = face.float()
    assert single.predict(x.float(), seed=0)[0].dtype == torch.float32


@faces
def test_predictions_follow_the_model(make_face):
    if make_face in (FACES["swag"], FACES["laplace"]):
        pytest.skip("predicts with what was collected, or fitted")
    face, x = make_face(mlp), randn(N, 4)
    before = face.predict(x, seed=0)[0]
    nudged(face, 3, 0.5)
    assert not torch.allclose(face.predict(x, seed=0)[0], before)


@pytest.mark.parametrize("call", [MCDropout, SWAG, DeepEnsemble, LaplaceApproximation, VariationalBayesNN])
def test_faces_refuse_what_they_cannot_use(call):
    argument = (lambda: mlp()) if call is DeepEnsemble else mlp()
    with pytest.raises(ValueError, match=rf"`{call.__name__}\(likelihood=\.\.\.\)`.*got 'logits'"):
        call(argument, likelihood="logits")
    with pytest.raises(TypeError, match=rf"`{call.__name__}\(model.*got (int|NoneType)"):
        call(3 if call is DeepEnsemble else None)
    if call is not DeepEnsemble:
        with pytest.raises(ValueError, match=rf"`{call.__name__}\(num_samples=\.\.\.\)`.*at least 1, got 0"):
            call(argument, num_samples=0)


# MC dropout.


def test_mc_dropout_predicts_as_the_posterior_does():
    model, x = seeded(mlp), randn(N, 4)
    fn, params = fb.make_functional(model)
    for rate in (0.1, 0.5, None):
        expected = fb.predict(
            fn, params, fb.Dropout(rate=rate), x, likelihood=Categorical(), num_samples=30, seed=2
        )
        face = MCDropout(model, num_samples=30, dropout_rate=rate)
        mean, variance = face.predict(x, seed=2)
        assert_close(mean, expected.mean)
        assert_close(variance, expected.epistemic_variance)
        assert_close(face.predict_entropy(x, seed=2), expected.entropy)


def test_mc_dropout_leaves_batch_norm_in_evaluation_mode():
    model, x = seeded(conv_net), randn(N, 2, 4, 4)
    face = MCDropout(model, dropout_rate=1e-9).train()
    expected = copy.deepcopy(model).eval()(x).softmax(-1)
    assert_close(face.predict(x, seed=0)[0], expected)


def test_forward_of_mc_dropout_is_the_model():
    model, x = seeded(mlp), randn(N, 4)
    face = MCDropout(model).eval()
    assert torch.equal(face(x), model(x))
    face.train()
    assert not torch.equal(face(x), face(x))


def test_the_entropy_of_a_regression_is_refused():
    with pytest.raises(ValueError, match="predict_entropy.*a classifier"):
        MCDropout(seeded(functools.partial(mlp, 1))).predict_entropy(randn(N, 4))


# Deep ensembles.


def test_a_deep_ensemble_holds_modules_and_predicts_as_the_posterior_does():
    face, x = ensemble(num_models=3), randn(N, 4)
    assert isinstance(face.models, nn.ModuleList)
    assert len(face.models) == 3
    fn, members = fb.ensemble.from_modules(face.models)
    expected = fb.predict(fn, None, members, x, likelihood=Categorical())
    mean, variance = face.predict(x)
    assert_close(mean, expected.mean)
    assert_close(variance, expected.epistemic_variance)


def test_diversity_is_the_variance_over_members_averaged_over_outputs():
    face, x = ensemble(), randn(N, 4)
    with torch.no_grad():
        probs = torch.stack([model.eval()(x).softmax(-1) for model in face.models])
    assert_close(face.diversity(x), probs.var(0).mean(-1))
    assert face.diversity(x).shape == (N,)


def test_forward_is_one_member_or_their_average():
    face, x = ensemble().eval(), randn(N, 4)
    outputs = torch.stack([model(x) for model in face.models])
    assert_close(face(x), outputs.mean(0))
    assert_close(face(x, model_idx=2), outputs[2])
    assert face(x).requires_grad


def test_training_a_member_is_plain_training_of_that_member_alone():
    face = ensemble(functools.partial(mlp, 3, 0.0))
    x, y = randn(20, 4), torch.randint(3, (20,), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    before = copy.deepcopy(face.models)
    expected = copy.deepcopy(face.models[1])
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for _ in range(3):
        for batch_x, batch_y in loader:
            optimizer.zero_grad()
            F.cross_entropy(expected(batch_x), batch_y).backward()
            optimizer.step()
    sgd = torch.optim.SGD(face.models[1].parameters(), lr=0.1)
    losses = face.train_member(1, loader, sgd, F.cross_entropy, num_epochs=3, device="cpu")
    assert len(losses) == 3
    assert losses[2] < losses[0]
    for one, two in zip(face.models[1].parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, two)
    for k in (0, 2, 3, 4):
        for one, two in zip(face.models[k].parameters(), before[k].parameters(), strict=True):
            assert torch.equal(one, two)


def test_training_a_member_leaves_its_mode_and_refuses_what_cannot_train_it():
    face = ensemble(num_models=2).eval()
    batches = [(randn(4, 4), torch.tensor([0, 1, 2, 0]))]
    sgd = torch.optim.SGD(face.models[0].parameters(), lr=0.1)
    face.train_member(0, batches, sgd, F.cross_entropy)
    assert not face.models[0].training
    with pytest.raises(ValueError, match=r"`train_member\(1, \.\.\., optimizer\)`.*models\[1\]"):
        face.train_member(1, batches, sgd, F.cross_entropy)
    with pytest.raises(IndexError, match="below the number of members 2, got 2"):
        face.train_member(2, batches, sgd, F.cross_entropy)
    with pytest.raises(TypeError, match=r"re-iterable for several epochs.*list\(batches\)"):
        face.train_member(0, iter(batches), sgd, F.cross_entropy, num_epochs=2)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        face.train_member(0, [], sgd, F.cross_entropy)
    with pytest.raises(IndexError, match="got 5"):
        face(randn(2, 4), model_idx=5)


# SWAG.


def test_swag_predicts_as_the_gaussian_of_its_snapshots_does():
    model, x = seeded(mlp), randn(N, 4)
    face = SWAG(model, num_samples=10, max_models=3, var_clamp=1e-4)
    fn, params = fb.make_functional(model)
    state, trained = fb.swag.init(params, rank=3), copy.deepcopy(model)
    for step in range(6):
        nudged(trained, step)
        face.collect_model(trained)
        state = fb.swag.update(state, dict(trained.named_parameters()))
    gaussian = fb.swag.posterior(state, scale=0.5, var_floor=1e-4)
    expected = fb.predict(fn, None, gaussian, x, likelihood=Categorical(), num_samples=10, seed=1)
    mean, variance = face.predict(x, seed=1)
    assert_close(mean, expected.mean)
    assert_close(variance, expected.epistemic_variance)
    draw = face.sample_parameters(seed=1)
    assert draw.keys() == params.keys()
    for name, leaf in gaussian.sample(1, seed=1).items():
        assert_close(draw[name], leaf[0])


def test_snapshots_are_not_changed_by_later_training():
    model = seeded(mlp)
    face = SWAG(model)
    for step in range(3):
        face.collect_model(nudged(model, step))
    before = face.sample_parameters(seed=0)
    nudged(model, 7, 10.0)
    for name, leaf in face.sample_parameters(seed=0).items():
        assert torch.equal(leaf, before[name])


def test_swag_predicts_with_the_buffers_of_what_was_collected():
    held, trained, x = seeded(conv_net), seeded(conv_net), randn(N, 2, 4, 4)
    face = SWAG(held, likelihood="regression", num_samples=2, scale=1e-12, var_clamp=0.0)
    for step in range(3):
        nudged(trained, step).train()(randn(8, 2, 4, 4, seed=step))  # which moves the statistics
        face.collect_model(trained)
    fn, _ = fb.make_functional(trained)
    mean = {**face._gaussian("predict").mean}
    expected = fn({**mean, **{k: fb.Fixed(b) for k, b in trained.named_buffers()}}, x)
    assert_close(face.predict(x, seed=0)[0], expected.detach(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        held[1].running_mean.add_(5.0)
    assert_close(face.predict(x, seed=0)[0], expected.detach(), rtol=1e-4, atol=1e-4)


def test_refreshed_draws_are_kept_by_a_state_dict_and_follow_the_dtype():
    face, x = swag(seeded(conv_net), num_samples=4), randn(N, 2, 4, 4)
    face.refresh_batch_norm((randn(12, 2, 4, 4, seed=5), torch.zeros(12).long()), seed=0)
    other = SWAG(seeded(conv_net, 9))
    other.load_state_dict(face.state_dict())
    assert_close(other.predict(x)[0], face.predict(x)[0])
    expected = face.predict(x)[0].float()
    assert_close(face.float().predict(x.float())[0], expected, rtol=1e-4, atol=1e-4)


def test_a_state_of_another_architecture_is_refused_and_changes_nothing():
    face = swag(seeded(mlp))
    before = face.sample_parameters(seed=0)
    with pytest.raises(ValueError, match="same architecture"):
        face.load_state_dict(swag(seeded(conv_net)).state_dict(), strict=False)
    for name, leaf in face.sample_parameters(seed=0).items():
        assert_close(leaf, before[name])


def test_wrapped_modules_are_collected_as_what_is_inside():
    model = seeded(mlp)
    face, other = SWAG(model), SWAG(model)
    for step in range(3):
        nudged(model, step)
        face.collect_model(nn.DataParallel(model))
        other.collect_model(model)
    for name, leaf in face.sample_parameters(seed=0).items():
        assert torch.equal(leaf, other.sample_parameters(seed=0)[name])
    with pytest.raises(ValueError, match=r"`SWAG\.collect_model\(model\)`.*architecture"):
        face.collect_model(seeded(conv_net))


@pytest.mark.parametrize(
    "argument", [{"var_clamp": -1.0}, {"scale": 0.0}, {"max_models": -1}, {"scale": "x"}]
)
def test_swag_refuses_bad_numbers_before_any_training(argument):
    with pytest.raises(ValueError, match=rf"`SWAG\({next(iter(argument))}=\.\.\.\)`"):
        SWAG(seeded(mlp), **argument)


def test_one_module_is_no_ensemble():
    shared = seeded(mlp)
    with pytest.raises(ValueError, match="a new module at every call"):
        DeepEnsemble(lambda: shared, num_models=3)


def test_a_rate_can_be_changed_later():
    face, x = MCDropout(seeded(mlp)), randn(N, 4)
    low = face.predict(x, seed=0)[1].mean()
    face.dropout_rate = 0.7
    assert face.predict(x, seed=0)[1].mean() > 2 * low


def test_swag_says_that_a_snapshot_is_missing():
    face = SWAG(seeded(mlp))
    with pytest.raises(
        RuntimeError, match=r"`SWAG\.predict` needs a snapshot: call `collect_model\(model\)`"
    ):
        face.predict(randn(N, 4))
    with pytest.raises(RuntimeError, match=r"`SWAG\.sample_parameters` needs a snapshot"):
        face.sample_parameters()
    with pytest.raises(RuntimeError, match="needs a snapshot"):
        face.refresh_batch_norm((randn(N, 4), torch.zeros(N)))


def test_refreshed_batch_norm_is_that_of_the_function():
    model, x = seeded(conv_net), randn(N, 2, 4, 4)
    data = randn(12, 2, 4, 4, seed=5), torch.zeros(12).long()
    face = swag(model, num_samples=4)
    plain = face.predict(x, seed=0)[0]
    face.refresh_batch_norm(data, seed=0)
    fn, params = fb.make_functional(model)
    draws = fb.to_ensemble(face._gaussian("predict"), 4, seed=0)
    expected = fb.predict(
        fn, params, fb.refresh_batch_norm(fn, params, draws, data), x, likelihood=Categorical()
    )
    assert_close(face.predict(x)[0], expected.mean)
    assert not torch.allclose(face.predict(x)[0], plain)
    face.collect_model(nudged(model, 9))  # what was refreshed belongs to the snapshots before
    assert not torch.allclose(face.predict(x, seed=0)[0], expected.mean)


def test_forward_of_swag_is_the_model():
    model, x = seeded(mlp), randn(N, 4)
    face = SWAG(model).eval()
    assert torch.equal(face(x), model(x))


# The Laplace approximation.


@pytest.mark.parametrize("structure", ["diag", "kron", "low_rank", "full"])
@pytest.mark.parametrize("where", [None, "3.*"])
def test_the_laplace_face_is_the_posterior_of_the_functions(structure, where):
    model, x = seeded(mlp), randn(N, 4)
    face = LaplaceApproximation(model, 25, structure=structure, where=where, prior_precision=0.5)
    data = data_for(model)
    face.fit(data, seed=3)
    fn, params = fb.make_functional(model)
    likelihood = Categorical()
    q = fb.laplace.fit(
        *(fn, params, data, likelihood), structure=structure, where=where, prior_precision=0.5, seed=3
    )
    expected = fb.predict(fn, params, q, x, likelihood=likelihood, num_samples=25, seed=2)
    mean, variance = face.predict(x, seed=2)
    assert_close(mean, expected.mean)
    assert_close(variance, expected.epistemic_variance)
    closed = fb.predict_linearized(fn, params, q, x, likelihood=likelihood, link="bridge")
    assert_close(face.predict_linearized(x, link="bridge").mean, closed.mean)
    c = fb.curvature.ggn(fn, params, data, likelihood, structure, where, seed=3)
    assert_close(face.log_marginal_likelihood(), fb.laplace.log_marginal_likelihood(params, c, 0.5))
    assert set(face.sample_parameters(seed=0)) == set(q.mean)


@pytest.mark.parametrize(
    "options",
    [{"curvature": "empirical_fisher"}, {"curvature": "fisher"}, {"weight_sharing": "reduce"}],
    ids=["empirical_fisher", "fisher", "reduce"],
)
def test_the_laplace_face_has_every_curvature(options):
    model = seeded(conv_net)
    face = LaplaceApproximation(model, **options)
    data = data_for(model)
    face.fit(data, seed=3, max_bytes=1 << 16)
    fn, params = fb.make_functional(model)
    q = fb.laplace.fit(fn, params, data, Categorical(), seed=3, **options)
    sampled = face.sample_parameters(seed=1)
    for name, leaf in q.sample(1, seed=1).items():
        assert_close(sampled[name], leaf[0])


def test_a_curvature_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"`LaplaceApproximation\(curvature=...\)` should be one of 'ggn'"):
        LaplaceApproximation(mlp(), curvature="gnn")


def test_the_laplace_face_chooses_prior_and_noise_by_evidence():
    model = seeded(functools.partial(mlp, 1))
    face = LaplaceApproximation(model, structure="full", noise_std=3.0)
    x = randn(300, 4, seed=5)
    y = copy.deepcopy(model).eval()(x).detach() + 0.1 * randn(len(x), 1, seed=8)
    face.fit((x, y))
    before = face.log_marginal_likelihood()
    wide = face.predict_linearized(x).aleatoric_variance
    face.optimize_prior_precision()
    assert face.log_marginal_likelihood() > before
    assert 0.07 < face.noise_std < 0.14  # the noise of the targets is 0.1
    assert_close(wide, torch.full_like(wide, 9.0))
    assert_close(face.predict_linearized(x).aleatoric_variance, torch.full_like(wide, face.noise_std**2))


@pytest.mark.parametrize("noise_std", [None, 0.3])
def test_the_laplace_face_takes_the_noise_of_its_likelihood(noise_std):
    model, x = seeded(functools.partial(mlp, 2)), randn(N, 4)
    likelihood, data = Normal(0.3), (randn(30, 4, seed=5), randn(30, 2, seed=6))
    face = LaplaceApproximation(model, structure="full", likelihood=likelihood, noise_std=noise_std)
    face.fit(data)
    fn, params = fb.make_functional(model)
    c = fb.curvature.ggn(fn, params, data, likelihood, "full")

    def is_that_of_the_functions(noise_std, prior_precision):
        q = fb.laplace.posterior(params, c, prior_precision, noise_std=noise_std)
        expected = fb.predict_linearized(fn, params, q, x, likelihood=Normal(noise_std))
        found = face.predict_linearized(x)
        assert_close(found.output_variance, expected.output_variance)
        assert_close(found.aleatoric_variance, torch.full_like(x[:, :2], noise_std**2))
        evidence = fb.laplace.log_marginal_likelihood(params, c, prior_precision, noise_std=noise_std)
        assert_close(face.log_marginal_likelihood(), evidence)

    is_that_of_the_functions(0.3, 1.0)
    face.optimize_prior_precision(data)  # of a grid, with the noise as it is
    best = fb.laplace.minimize_validation_nll(fn, params, c, data, likelihood)
    assert_close(face.prior_precision, best.prior_precision)
    face.optimize_prior_precision()
    assert abs(face.noise_std - 0.3) > 0.1
    is_that_of_the_functions(face.noise_std, face.prior_precision)


@pytest.mark.parametrize("likelihood", [Normal(0.3), Normal(torch.ones(3)), Categorical()])
def test_the_laplace_face_refuses_a_noise_that_its_likelihood_has_not(likelihood):
    with pytest.raises(ValueError, match=r"likelihood=.*noise_std=0.5\)` should say the noise once"):
        LaplaceApproximation(mlp(), likelihood=likelihood, noise_std=0.5)


def test_the_laplace_face_keeps_what_was_fitted_in_its_state(tmp_path):
    model, x = seeded(mlp), randn(N, 4)
    face = LaplaceApproximation(model, structure="kron")
    face.fit(data_for(model))
    face.optimize_prior_precision(per="leaf")
    torch.save(face.state_dict(), tmp_path / "state.pt")
    other = LaplaceApproximation(seeded(mlp, 9))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_close(other.log_marginal_likelihood(), face.log_marginal_likelihood())
    assert_close(other.predict_linearized(x).mean, face.predict_linearized(x).mean)
    another = LaplaceApproximation(nn.Linear(4, 3).double())
    with pytest.raises(ValueError, match=r"load_state_dict.*same architecture"):
        another.set_extra_state(face.get_extra_state())


def test_the_laplace_face_is_of_the_weights_it_was_fitted_at():
    model, x = seeded(mlp), randn(N, 4)
    face = LaplaceApproximation(model)
    face.fit(data_for(model))
    before = face.predict(x, seed=0)[0]
    nudged(model, 3, 0.5)
    assert_close(face.predict(x, seed=0)[0], before)
    face.fit(data_for(model))
    assert not torch.allclose(face.predict(x, seed=0)[0], before)


@pytest.mark.parametrize(
    "call", ["predict", "predict_linearized", "sample_parameters", "log_marginal_likelihood"]
)
def test_the_laplace_face_says_that_it_was_not_fitted(call):
    face = LaplaceApproximation(mlp())
    arguments = (randn(N, 4).float(),) if call.startswith("predict") else ()
    with pytest.raises(RuntimeError, match=r"call `fit\(data\)` before"):
        getattr(face, call)(*arguments)
    with pytest.raises(ValueError, match="at least one batch an epoch, got none"):
        face.fit([])


def test_the_laplace_face_chooses_the_prior_by_held_out_data_too():
    model = seeded(mlp)
    face = LaplaceApproximation(model, structure="kron", eigenvalue_correction=True, temperature=0.5)
    data = data_for(model)
    face.fit(data)
    held_out = (randn(30, 4, seed=9), torch.randint(3, (30,), generator=torch.Generator().manual_seed(1)))
    face.optimize_prior_precision(held_out)
    fn, params = fb.make_functional(model)
    c = fb.curvature.ggn(fn, params, data, Categorical(), eigenvalue_correction=True)
    best = fb.laplace.minimize_validation_nll(fn, params, c, held_out, Categorical(), temperature=0.5)
    assert_close(face.prior_precision, best.prior_precision)
    q = fb.laplace.posterior(params, c, best.prior_precision, temperature=0.5)
    expected = fb.predict(fn, params, q, held_out[0], likelihood=Categorical(), num_samples=32, seed=0)
    assert_close(face.predict(held_out[0], seed=0)[0], expected.mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "dense"}, "structure=.*one of 'diag'.*got 'dense'"),
        ({"noise_std": 0.0}, "noise_std=.*positive and finite, got 0"),
        ({"temperature": -1.0}, "temperature=.*positive and finite, got -1"),
        ({"prior_precision": 0.0}, "prior_precision=.*positive and finite, got 0"),
        ({"prior_precision": {"0.weight": 0.0}, "where": "0.weight"}, "prior_precision=.*number of 0 and"),
        ({"prior_precision": {"0.weight": 1.0}}, "prior_precision=.*'0.bias' is missing"),
        ({"prior_precision": {"3.bias": torch.arange(1.0, 4)}, "where": "3.bias"}, "'kron' should be given"),
    ],
)
def test_the_laplace_face_refuses_bad_numbers_before_any_fit(options, message):
    with pytest.raises(ValueError, match=message):
        LaplaceApproximation(mlp(), **options)


@pytest.mark.parametrize(
    ("held_out", "options", "message"),
    [
        (True, {"per": "leaf"}, r"optimize_prior_precision\(validation, per='leaf'.*one precision for the"),
        (True, {"tune_noise": True}, "tune_noise=True.*no noise"),
        (True, {"per": "junk"}, "per=.*should be 'model', 'leaf' or 'parameter', got 'junk'"),
        (False, {"per": "junk"}, "per=.*should be 'model', 'leaf' or 'parameter', got 'junk'"),
        (False, {"per": "parameter"}, "'parameter' with a Kronecker curvature"),
    ],
)
def test_the_laplace_face_refuses_what_choosing_a_prior_cannot_do(held_out, options, message):
    model = seeded(mlp)
    face = LaplaceApproximation(model)
    face.fit(data_for(model))
    with pytest.raises(ValueError, match=message):
        face.optimize_prior_precision(data_for(model) if held_out else None, **options)


# Variational inference.


def test_the_variational_face_refuses_an_option_that_there_is_not():
    face = VariationalBayesNN(seeded(mlp))
    with pytest.raises(TypeError, match=r"VariationalBayesNN.fit\(bach_size=...\)` is no option"):
        face.fit(data_for(face.model), optimizer=ADAM, num_epochs=1, bach_size=5)


def test_a_gaussian_linear_map_has_features():
    with pytest.raises(ValueError, match=r"GaussianLinear\(in_features=...\)` should be at least 1, got 0"):
        GaussianLinear(0, 2)


ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


@pytest.mark.parametrize("family", ["diag", "low_rank", "kron", "full"])
def test_the_variational_face_is_fitted_as_the_function_fits(family):
    model = seeded(mlp)
    fn, params = fb.make_functional(model)
    data = data_for(model)
    face = VariationalBayesNN(model, family=family, rank=2, prior_precision=2.0)
    options = {"optimizer": ADAM, "num_epochs": 3, "batch_size": 5, "seed": 1}
    face.fit(data, **options)
    start = fb.vi.init(params, family, rank=2)
    q = fb.vi.fit(fn, params, data, Categorical(), start=start, prior_precision=2.0, **options)
    found = face.posterior()
    for name in params:
        assert_close(found.mean[name], q.mean[name])
        assert_close(found.variance[name], q.variance[name])
        assert_close(dict(model.named_parameters())[name].detach(), q.mean[name])
    x = randn(N, 4)
    expected = fb.predict(fn, None, q, x, likelihood=Categorical(), num_samples=32, seed=0)
    assert_close(face.predict(x, seed=0)[0], expected.mean, rtol=1e-4, atol=1e-5)


def test_the_variational_face_keeps_statistics_of_batch_norm():
    model = seeded(conv_net)
    before = model[1].running_mean.clone()
    face = VariationalBayesNN(model)
    face.fit(data_for(model), optimizer=ADAM, num_epochs=2, seed=0)
    assert not torch.allclose(model[1].running_mean, before)
    assert int(model[1].num_batches_tracked) == 2


@pytest.mark.parametrize("family", ["diag", "kron"])
def test_the_variational_face_is_trained_by_a_loop_of_ones_own(family):
    model = seeded(mlp)
    x, y = data_for(model)
    face = VariationalBayesNN(model, family=family, where="3.*")
    assert {name.rpartition(".")[0] for name in face.state.mean} == {"3"}
    state = face.state.detached()
    fn, params = fb.make_functional(model)
    loss = face.negative_elbo(x, y, num_data=100, num_samples=4, seed=3)
    held = {name: p for name, p in params.items() if not name.startswith("3.")}
    expected = fb.vi.negative_elbo(
        fn, held, state, (x, y), Categorical(), num_data=100, num_samples=4, seed=3
    )
    assert_close(loss.detach(), expected)
    loss.backward()
    assert all(p.grad is not None for p in face.parameters())
    zero = {name: torch.zeros_like(leaf) for name, leaf in state.mean.items()}
    ones = {name: torch.ones_like(leaf) for name, leaf in zero.items()}
    prior = fb.Gaussian(zero, fb.covariances.Diagonal(ones))
    assert_close(face.kl_divergence().detach(), fb.kl(face.posterior(), prior))


def test_the_variational_face_refuses_what_was_decided_before():
    model = seeded(mlp)
    face = VariationalBayesNN(model, prior=fb.priors.Horseshoe())
    with pytest.raises(TypeError, match=r"fit\(family=\.\.\.\)` is no option here"):
        face.fit(data_for(model), optimizer=ADAM, num_epochs=1, family="full")
    with pytest.raises(NotImplementedError, match="no closed form for a HorseshoePrior"):
        face.kl_divergence()
    with pytest.raises(ValueError, match=r"noise_std=.* positive"):
        VariationalBayesNN(model, noise_std=0.0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_gaussian_layer_has_the_moments_of_its_weights(bias):
    layer, x = seeded(lambda: GaussianLinear(3, 2, bias, init_scale=0.3)), randn(5, 3)
    outputs = torch.stack([layer(x, seed=k) for k in range(1000)]).detach()
    q = layer.posterior()
    mean = F.linear(x, q.mean["weight"], q.mean.get("bias"))
    variance = F.linear(x**2, q.variance["weight"], q.variance.get("bias"))
    assert ((outputs.mean(0) - mean).abs() < 5 * (variance / 1000).sqrt()).all()
    assert ((outputs.var(0) / variance - 1).abs() < 5 * (2 / 1000) ** 0.5).all()
    assert_close(layer.eval()(x), mean)
    assert_close(layer(x, sample=False), mean)
    assert not torch.allclose(layer(x, sample=True, seed=0), mean)


def test_a_gaussian_layer_has_the_divergence_from_its_prior():
    layer = seeded(lambda: GaussianLinear(3, 2, prior_std=2.0))
    q = layer.posterior()
    expected = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Normal(q.mean[name], q.variance[name].sqrt()),
            torch.distributions.Normal(0.0, 2.0),
        ).sum()
        for name in q.mean
    )
    assert_close(layer.kl_divergence().detach(), expected)
    (layer(randn(4, 3)).sum() + layer.kl_divergence()).backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
        "weight_mean",
        "weight_rho",
        "bias_mean",
        "bias_rho",
    }
    assert "in_features=3, out_features=2, bias=True, prior_std=2.0" in repr(layer)


def test_a_gaussian_layer_refuses_scales_that_are_not_positive():
    for name in ("prior_std", "init_scale"):
        with pytest.raises(ValueError, match=rf"GaussianLinear\({name}=.* positive"):
            GaussianLinear(3, 2, **{name: 0.0})
