package pause

import _ "embed"

//go:embed pause_arm64.elf
var elf []byte
