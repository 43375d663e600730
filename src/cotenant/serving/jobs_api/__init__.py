"""The jobs API: jobs, logs and files over HTTP, for those who are not on the box.

app            the routes, and who may ask them
requests       what bodies and queries hold
following      logs that are waited for
uploads        archives that clients bring, on the disk
unpack         what unpacks one, a program of its own
"""
