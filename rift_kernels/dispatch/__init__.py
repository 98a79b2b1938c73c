"""From arguments to values: checks, ranks that share a batch, the plan, autograd, operators."""
