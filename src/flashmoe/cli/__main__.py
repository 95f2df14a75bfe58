"""`python -m flashmoe.cli`"""

from flashmoe.cli import main

main()
