module tangram.gpu/tests/e2e/seen

go 1.26
