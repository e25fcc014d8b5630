def compare(r): raise NotImplementedError
