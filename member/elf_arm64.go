package member

import _ "embed"

//go:embed monitor_arm64.elf
var monitorELF []byte
