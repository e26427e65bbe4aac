from tokenlearner.cli import main

main()
