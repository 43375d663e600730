"""Virtual time: the policy without a machine. The first use is replaying a journal."""
