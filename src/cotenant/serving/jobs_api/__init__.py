"""The jobs API: jobs, logs and files over HTTP, for those who are not on the box.

    app            the routes, and who may ask them
    requests       what bodies and queries hold
    submitting     from a submission to a job in a directory of its own
    following      logs that are waited for
    uploads        archives that clients bring
    unpack         what unpacks one, a program of its own
    disk           threads for what waits for one

It sees the node only through ``cotenant.domain.port.NodePort``.
"""
