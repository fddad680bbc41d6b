package main

import (
	"os"
	"strconv"
	"time"
)

// dieWithParent ends this process soon after the one named by TANGRAM_PARENT_PID has gone, however it went (a
// SIGKILLed pytest runs no clean-up). PR_SET_PDEATHSIG would follow the thread that forked us, not the process.
func dieWithParent() {
	parent, err := strconv.Atoi(os.Getenv("TANGRAM_PARENT_PID"))
	if err != nil {
		return
	}
	go func() {
		for os.Getppid() == parent {
			time.Sleep(200 * time.Millisecond)
		}
		os.Exit(1)
	}()
}
