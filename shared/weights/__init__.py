"""Publishing, following and keeping versions of the policy."""
