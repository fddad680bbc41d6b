package main

import (
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The statuses that a pod gets from its kubelet. No I/O.

func refusedStatus(pod *v1.Pod, reason, message string) v1.PodStatus {
	now := metav1.Now()
	return v1.PodStatus{
		Phase: v1.PodFailed, Reason: reason, Message: "Pod was rejected: " + message,
		StartTime: &now, QOSClass: pod.Status.QOSClass,
	}
}

func runningStatus(pod *v1.Pod, started time.Time) v1.PodStatus {
	at := metav1.NewTime(started)
	running := v1.ContainerState{Running: &v1.ContainerStateRunning{StartedAt: at}}
	return v1.PodStatus{
		Phase: v1.PodRunning, StartTime: &at, QOSClass: pod.Status.QOSClass,
		Conditions:        conditions(v1.ConditionTrue, ""),
		ContainerStatuses: containerStatuses(pod, running),
	}
}

// endedStatus has all containers end alike; a pod that ended well is one whose containers all did.
func endedStatus(pod *v1.Pod, started time.Time, code int) v1.PodStatus {
	phase, reason := v1.PodSucceeded, "Completed"
	if code != exitedWell {
		phase, reason = v1.PodFailed, "Error"
	}
	at := metav1.NewTime(started)
	terminated := v1.ContainerState{Terminated: &v1.ContainerStateTerminated{
		ExitCode: int32(code), Reason: reason, StartedAt: at, FinishedAt: metav1.Now(),
	}}
	return v1.PodStatus{
		Phase: phase, StartTime: &at, QOSClass: pod.Status.QOSClass,
		Conditions:        conditions(v1.ConditionFalse, "PodCompleted"),
		ContainerStatuses: containerStatuses(pod, terminated),
	}
}

func conditions(ready v1.ConditionStatus, reason string) []v1.PodCondition {
	now := metav1.Now()
	return []v1.PodCondition{
		{Type: v1.PodInitialized, Status: v1.ConditionTrue, LastTransitionTime: now},
		{Type: v1.PodReady, Status: ready, Reason: reason, LastTransitionTime: now},
		{Type: v1.ContainersReady, Status: ready, Reason: reason, LastTransitionTime: now},
	}
}

func containerStatuses(pod *v1.Pod, state v1.ContainerState) []v1.ContainerStatus {
	statuses := []v1.ContainerStatus{}
	running := state.Running != nil
	for _, container := range pod.Spec.Containers {
		statuses = append(statuses, v1.ContainerStatus{
			Name: container.Name, Image: container.Image, ImageID: container.Image, ContainerID: "test://" + container.Name,
			State: state, Ready: running, Started: &running,
		})
	}
	return statuses
}
