"""Hyper-cleaning: learn a weight for each training sample from the loss on a few clean samples."""

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam

import mlopt

torch.manual_seed(0)
images, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
order = torch.randperm(len(images))
inputs, labels = images[order].float() / 16, digits[order]
train, valid, test = slice(0, 1000), slice(1000, 1300), slice(1300, None)
corrupted = torch.rand(1000) < 0.5  # half of the training labels are replaced by random ones
noisy = torch.where(corrupted, torch.randint(10, (1000,)), labels[train])


def training_loss(classifier, batch, *, weights):  # own module, own batch, then the levels it depends on, by name
    inputs, labels = batch
    losses = cross_entropy(classifier(inputs), labels, reduction="none")
    return (weights().sigmoid() * losses).mean() + 1e-3 * sum(p.square().sum() for p in classifier.parameters())


def validation_loss(weights, batch, *, classifier):
    inputs, labels = batch
    return cross_entropy(classifier(inputs), labels)


weights = mlopt.variables(torch.zeros(1000))
classifier = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
noisy_data, clean_data = [(inputs[train], noisy)], [(inputs[valid], labels[valid])]
sgd, adam = partial(SGD, lr=0.5, momentum=0.9), partial(Adam, lr=0.1)
estimator = mlopt.ConjugateGradient(iterations=10, damping=2e-2)
problem = mlopt.Problem(  # outermost level first
    mlopt.Level("weights", weights, validation_loss, data=clean_data, optimizer=adam),
    mlopt.Level("classifier", classifier, training_loss, data=noisy_data, optimizer=sgd, steps=10, estimator=estimator),
)
solution = mlopt.solve(problem, steps=200)
print(solution.reports["classifier"])

# The README ends here. The rest evaluates the weights, and trains the same network with equal weights for comparison.
intact = noisy == labels[train]  # a random label may be the right one
area = (weights()[intact][:, None] > weights()[~intact]).float().mean()
print(f"area under ROC of 'label is intact', by weight: {area:.3f}")

plain = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
# A keyword with a default is not a reference to a level; the sigmoid of infinity is 1.
plain_loss = partial(training_loss, weights=lambda: torch.full((1000,), torch.inf))
mlopt.solve(mlopt.Problem(mlopt.Level("plain", plain, plain_loss, data=noisy_data, optimizer=sgd)), steps=2_000)


def accuracy(network):
    return (network(inputs[test]).argmax(1) == labels[test]).float().mean().item()


print(f"accuracy on the test digits: {accuracy(plain):.3f} trained on all, {accuracy(classifier):.3f} reweighted")
