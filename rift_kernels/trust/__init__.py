"""Which kernels ``auto`` may use: those that passed a test on known answers.

``decisions`` has the answer for each kind of call, and ``self_test`` gets it. ``examination`` runs
the test in a separate process, which is ``rift_kernels.commands.trial``; ``known_answers`` has its
cases. ``verdicts`` keeps results on disk. ``refused_launches`` knows errors that another kernel may
avoid.
"""
