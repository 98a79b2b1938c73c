"""From checked arguments to a backend and back: the plan of a call, operators, autograd, ranks."""
