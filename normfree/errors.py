"""What goes wrong in a way that the user can mend."""


class SignalError(RuntimeError):
    """A model that cannot be measured, or whose signal is not as it was asked to be."""
