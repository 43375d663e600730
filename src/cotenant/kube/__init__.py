"""``cotenant-dra``: a Cotenant node as devices of a Kubernetes cluster (DRA).

A process of its own beside the node, which it reaches by the control socket alone.

* ``inventory`` and ``slices`` say what is published, ``parameters`` and ``claims`` what a claim
  asks for. These are pure.
* ``publisher`` and ``binding`` keep cluster and node in step. Each pass compares what is with what
  should be, so a pass that failed is only made again.
* ``plugin`` serves the kubelet: ``preparing`` has the steps and their laws.
* ``boost`` tells Kueue which jobs lose little by being moved; a process of its own.
"""
