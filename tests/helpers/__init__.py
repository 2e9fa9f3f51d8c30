from helpers import typechecker as typechecker  # jaxtyping imports the package alone
