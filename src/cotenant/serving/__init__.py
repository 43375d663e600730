"""Front ends: bytes to domain calls and back, over REST, gRPC and a local control socket.

    calls, tensors    what a request means, and what its tensors must fulfil (pure)
    oip               the Open Inference Protocol's JSON and binary forms (pure)
    bodies, rest, rest_admin, http_front      the protocol over HTTP, and the server for it
    protos, grpc_codec, grpc_admin, grpc_front    the protocol over gRPC
    http2_frames, http2, grpc_wire    and the server for that
    admin             what both say about models, statistics and versions
    intake            limits, memory and tokens of both
    listening, overdue    sockets; one timer for many waits
    regions           clients' shared memory, used by both
    control           jobs and status for the command line, over a Unix socket
    jobs_api          the same for those who are not on the box, over HTTP; tls, tokenfile, failures
    jobs_client       and its client; packing
    joblogs           a job's log from where one got to, for both
    refusals          which refusal and which error becomes which status

They see the node only through ``cotenant.domain.port.NodePort`` and decide nothing.
"""
